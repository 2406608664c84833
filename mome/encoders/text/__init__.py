"""Text encoders turn words into rows (P, T). They are no part of the model. Nothing here imports torch."""

from mome.registry import TEXT_ENCODERS

TEXT_ENCODERS.register("hf", "mome.encoders.text.hf:HuggingFaceText", summary="any Hugging Face text model")
TEXT_ENCODERS.register("clip", "mome.encoders.text.clip:CLIPText", summary="the text half of a CLIP model")
TEXT_ENCODERS.register("bank", "mome.encoders.text.stored:BankText", summary="stored embeddings only, no tower")
TEXT_ENCODERS.register("learned", "mome.encoders.text.stored:LearnedText", summary="a row learned for every label")
TEXT_ENCODERS.register("none", "mome.encoders.text.stored:NoText", summary="labels by number, no text at all")
