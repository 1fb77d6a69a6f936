"""ViTok-v2: a native-resolution ViT image autoencoder. Needs no Ray."""

from vitok.autoencoder import Autoencoder
from vitok.packed import PackedTokens, pack_images, unpack_images
from vitok.variants import AutoencoderConfig

__all__ = ["Autoencoder", "AutoencoderConfig", "PackedTokens", "pack_images", "unpack_images"]
