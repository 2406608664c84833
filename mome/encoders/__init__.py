"""Vision encoders turn a volume (B, C, D, H, W) into a Pyramid. Nothing here imports torch."""

from mome.registry import ENCODERS

ENCODERS.register("unet", "mome.encoders.unet:UNet", summary="compact 3D U-Net, decoder built from its encoder")
ENCODERS.register("swin_unetr", "mome.encoders.swin_unetr:SwinUNETR", summary="Swin UNETR through MONAI")
