"""ViTok-v2: a native-resolution ViT image autoencoder. Needs no Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitok.autoencoder import Autoencoder
    from vitok.packed import PackedTokens, pack_images, unpack_images
    from vitok.variants import AutoencoderConfig

__all__ = ["Autoencoder", "AutoencoderConfig", "PackedTokens", "pack_images", "unpack_images"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the model brings torch's compiler, which takes seconds to import and
    # which the many processes that only read and decode images never need.
    if name == "Autoencoder":
        from vitok import autoencoder

        return autoencoder.Autoencoder
    if name == "AutoencoderConfig":
        from vitok import variants

        return variants.AutoencoderConfig
    if name in __all__:
        from vitok import packed

        return getattr(packed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
