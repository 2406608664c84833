"""Vision encoders: volume (B, C, D, H, W) → Pyramid. Registered by name; nothing here imports torch."""

from mome.registry import ENCODERS

ENCODERS.register("unet", "mome.encoders.unet:UNet", summary="compact 3D U-Net, decoder built from its encoder")
ENCODERS.register("swin_unetr", "mome.encoders.swin_unetr:SwinUNETR", summary="Swin UNETR through MONAI")
