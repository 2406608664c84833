"""Converters: published weights of other projects become checkpoint folders of ours. Nothing here imports torch.

`convert` in `mome.convert.run` is the function behind `mome convert`. A family is one file with one function that says
which tensors of a file belong where.
"""

# Family → the function that reads its tensors, and one line for the help.
FAMILIES = {
    "ct-fm": ("mome.convert.segresnet:ct_fm", "CT-FM (Pai et al. 2025) → segresnet"),
    "segresnet": ("mome.convert.segresnet:segresnet", "MONAI's SegResNet and SegResNetDS → segresnet"),
    "swin-unetr": ("mome.convert.swin_unetr:swin_unetr", "MONAI's SwinUNETR, or its pre-trained encoder → swin_unetr"),
    "universal-model": (
        "mome.convert.universal_model:universal_model",
        "the CLIP-Driven Universal Model (Liu et al. 2023), with its head and text rows",
    ),
    "voco": ("mome.convert.swin_unetr:voco", "VoCo (Wu et al. 2024) → swin_unetr"),
}
