"""ViTok-v2: a native-resolution ViT image autoencoder. Needs no Ray."""

from vitok.autoencoder import Autoencoder, AutoencoderConfig
from vitok.packed import PackedTokens, pack_images, unpack_images

__all__ = ["Autoencoder", "AutoencoderConfig", "PackedTokens", "pack_images", "unpack_images"]
