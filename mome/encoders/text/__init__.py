"""Text encoders turn words into rows (P, T). They are no part of the model. Nothing here imports torch."""

from mome.registry import TEXT_ENCODERS

TEXT_ENCODERS.register("hf", "mome.encoders.text.hf:HuggingFaceText", summary="any Hugging Face text model")
TEXT_ENCODERS.register("clip", "mome.encoders.text.clip:CLIPText", summary="the text half of a CLIP model")
TEXT_ENCODERS.register(
    "open_clip",
    "mome.encoders.text.open_clip_text:OpenCLIPText",
    summary="the text half of an open_clip model, such as BiomedCLIP",
    extra="open_clip",
)
TEXT_ENCODERS.register("bank", "mome.encoders.text.bank:BankText", summary="stored rows only, no tower")
TEXT_ENCODERS.register("learned", "mome.encoders.text.learned:LearnedText", summary="a row learned for every label")
TEXT_ENCODERS.register("none", "mome.encoders.text.no_text:NoText", summary="labels by number, no text at all")
