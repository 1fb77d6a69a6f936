"""Figures that others have published, to be shown beside what was measured here.

All are of the ViTok-v2 paper (arXiv 2605.05331), which measured the other models too.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFigures:
    """One row of a published table.

    Attributes:
        subject: model, with pixels along each side of a latent and its channels.
        rfid, rfdd, psnr, ssim: None where there is none.
        seconds: of an image on one H100, in float8 and compiled.
    """

    subject: str
    rfid: float | None
    rfdd: float | None
    psnr: float | None
    ssim: float | None
    seconds: float | None = None

    @property
    def compression_ratio(self) -> float:
        """Numbers of the image for each number of the latent, 3 f^2 / c."""
        found = re.search(r"f(\d+)x(\d+)", self.subject)
        assert found is not None, self.subject
        return 3 * int(found[1]) ** 2 / int(found[2])


_IMAGENET_256P = (
    PublishedFigures("ViTok-v2 5B f16x64", 0.74, 2.49, 34.2, 0.924),
    PublishedFigures("ViTok-v2 5B f16x64, lambda 1000", 0.30, 1.12, 33.6, 0.914),
    PublishedFigures("ViTok-v2 5B f16x32", 1.26, 2.94, 31.2, 0.867),
    PublishedFigures("ViTok-v2 5B f16x16", 1.52, 3.66, 28.5, 0.793),
    PublishedFigures("FLUX.2 f8x16", 0.15, None, 31.1, 0.887),
    PublishedFigures("Qwen f8x16", 1.32, 7.36, 30.3, 0.860),
    PublishedFigures("SD-VAE f8x4", 0.73, 6.14, 25.7, 0.702),
    PublishedFigures("SDXL-VAE f8x8", 0.68, None, 26.0, 0.834),
    PublishedFigures("VA-VAE f16x32", 0.28, None, 28.0, 0.790),
    PublishedFigures("RAE f16x16", 0.61, None, 18.8, 0.496),
)
_DIV8K = (
    PublishedFigures("ViTok-v2 5B f16x64, 2048p", 0.06, 0.11, 34.9, 0.938, 0.294),
    PublishedFigures("ViTok-v2 5B f16x64, 4096p", None, None, None, None, 1.2),
    PublishedFigures("ViTok-v2 5B f16x64, 8192p", None, None, None, None, 5.4),
    PublishedFigures("ViTok-v2 5B f32x128, 4096p", None, None, None, None, 0.4),
    PublishedFigures("ViTok-v2 5B f32x128, 8192p", None, None, None, None, 1.3),
)
PUBLISHED: dict[str, tuple[PublishedFigures, ...]] = {
    "imagenet-256p": _IMAGENET_256P,
    "div8k": _DIV8K,
}
