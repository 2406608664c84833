"""Vision encoders turn a volume (B, C, D, H, W) into a Pyramid. Nothing here imports torch."""

from mome.registry import ENCODERS

ENCODERS.register("unet", "mome.encoders.unet:UNet", summary="compact 3D U-Net, decoder built from its encoder")
ENCODERS.register("swin_unetr", "mome.encoders.swin_unetr:SwinUNETR", summary="Swin UNETR through MONAI")
ENCODERS.register("segresnet", "mome.encoders.segresnet:SegResNet", summary="SegResNet through MONAI, CT-FM's network")
ENCODERS.register("mednext", "mome.encoders.mednext:MedNeXt", summary="MedNeXt S, B, M, L through MONAI")
ENCODERS.register(
    "resenc_unet",
    "mome.encoders.resenc_unet:ResEncUNet",
    summary="nnU-Net's residual encoder U-Net through dynamic-network-architectures",
    extra="resenc",
)
ENCODERS.register(
    "genesis_unet", "mome.encoders.genesis_unet:GenesisUNet", summary="the Universal Model's U-Net, of Models Genesis"
)
ENCODERS.register("monai", "mome.encoders.monai:MonaiNetwork", summary="other MONAI networks, by their names")
ENCODERS.register(
    "vit3d", "mome.encoders.vit3d:ViT3D", summary="vision transformer over 8³-voxel tokens, rotary positions"
)
ENCODERS.register("timm", "mome.encoders.timm:Timm", summary="any timm backbone, over slices or inflated to 3D")
