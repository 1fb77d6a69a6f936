"""Networks whose features describe an image for Fréchet distances: Inception-v3 and DINOv3.

An image is rounded to 8 bits first, as if it had been saved as a PNG and read again. The features
of an image do not depend on what is beside it, but for the rounding of floats; the same images in
the same order give the same features.
"""

import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from vitok.perceptual import imagenet_normalized, load_dino
from vitok.pretrained import weights_digest

# The file of StyleGAN2-ADA, which clean-fid and others use too: TensorFlow's Inception-v3 of 2015,
# to which the FID of papers refers, translated to TorchScript.
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_DINO_SIDE = 224  # pixels; what DINOv3's own preprocessing resizes to
_BATCH_PIXELS = 2**22  # of images that pass through a network together


class FeatureExtractor(Protocol):
    """What turns images into features.

    Attributes:
        digest: sha256 (hex) of its weights.
    """

    digest: str

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features [N, D], float32 on the CPU, of images [3, H, W] in [-1, 1]."""
        ...


class InceptionFeatures:
    """The 2,048 features of Inception-v3 before its last layer, for FID and Inception Score.

    The network resizes images of any size to 299 x 299 itself, without antialiasing, as TensorFlow
    did and as the FID of ADM and StyleGAN does; clean-fid resizes before it, with antialiasing, and
    gives other numbers. The aspect ratio is not kept.

    Args:
        network: called with uint8 images [N, 3, H, W] and return_features=True; its linear layer
            `output` leads from the features to the classes.
    """

    def __init__(self, network: Any, digest: str) -> None:
        self.network = network
        self.digest = digest

    @classmethod
    def load(
        cls, location: str, digest: str = "", device: torch.device | str = "cpu"
    ) -> "InceptionFeatures":
        """Load the TorchScript file; other files than the field's need their digest.

        Args:
            location: a file, or an https URL, which is downloaded once into torch.hub's folder.
            digest: sha256 (hex) that the file must have; empty for that of INCEPTION_URL.

        Raises:
            FileNotFoundError: there is no such file, or it cannot be downloaded.
            ValueError: the file has another digest, or is no such network.
        """
        expected = digest.lower() or INCEPTION_SHA256
        file = _download(location, expected) if "://" in location else Path(location).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"no Inception-v3 at {location!r}; download {INCEPTION_URL} (96 MB) and give the "
                "file as inception, or give that URL"
            )
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{file} has the sha256 {found}, not {expected}: it is damaged, or another. "
                f"Download {INCEPTION_URL}, or, if you trust this file, set inception_digest to "
                f"{found}"
            )
        try:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.export, in which nobody has published these weights.
                warnings.simplefilter("ignore", DeprecationWarning)
                network = torch.jit.load(str(file), map_location=device)
        except RuntimeError as error:
            raise ValueError(f"{file} is no TorchScript file: {error}") from error
        if not hasattr(network, "output"):
            raise ValueError(
                f"{file} has no layer `output`, as Inception-v3 of {INCEPTION_URL} has; take that"
            )
        return cls(network.eval(), found)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features [N, 2048], float32 on the CPU, of images [3, H, W] in [-1, 1]."""
        device = self.network.output.weight.device
        # What TorchScript makes of a network after its first passes rounds differently.
        with torch.jit.optimized_execution(False):
            return _by_size(
                images, lambda batch: self.network(batch.to(device), return_features=True).float()
            )

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probabilities of classes [N, 1008] that follow from features.

        Without the bias of the last layer, as the original Inception Score has it.
        """
        weight = self.network.output.weight
        logits = features.to(weight.device, torch.float32) @ weight.float().T
        return logits.softmax(dim=1).cpu()


class DinoFeatures:
    """The class token of DINOv3 after its last norm, for FDD.

    Stein et al. (arXiv 2306.04675) take the class token of DINOv2, which is trained as the
    description of the whole image; the paper of ViTok-v2 does not say what it takes of DINOv3.
    Images are resized to 224 x 224, bilinear with antialiasing, as DINOv3's own preprocessing does;
    the aspect ratio is not kept.

    Args:
        network: a transformers DINOv3ViTModel.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.digest = weights_digest(network)

    @classmethod
    def load(
        cls, weights: str, device: torch.device | str = "cpu", option: str = "networks.dino"
    ) -> "DinoFeatures":
        """Load DINOv3 from a folder or a Hugging Face repository that is already on this machine.

        Args:
            option: what the user sets, for the messages.

        Raises:
            FileNotFoundError: the weights are not there.
            ValueError: they are of another network, or not whole.
        """
        return cls(load_dino(weights, option).to(device))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features [N, D], float32 on the CPU, of images [3, H, W] in [-1, 1]."""
        return _by_size(images, self._features)

    def _features(self, batch: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        pixels = nn.functional.interpolate(
            batch.to(device).float() / 255,
            size=(_DINO_SIDE, _DINO_SIDE),
            mode="bilinear",
            antialias=True,
        )
        return self.network(imagenet_normalized(pixels)).pooler_output.float()


def to_levels(image: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to uint8; what lies outside is clamped."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _by_size(images: Sequence[Tensor], network: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a network on batches of images of one size, and put the results in order on the CPU."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(tuple(image.shape), []).append(place)
    found: dict[int, Tensor] = {}
    for shape, members in places.items():
        at_once = max(1, _BATCH_PIXELS // (shape[1] * shape[2]))
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            features = network(torch.stack([to_levels(images[place]) for place in part]))
            found |= dict(zip(part, features.cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(images))])


def _download(url: str, digest: str) -> Path:
    """Return a file of torch.hub's folder, after downloading it where it is not there."""
    if urlsplit(url).scheme != "https":
        raise ValueError(f"{url} is no https URL; give one, or the path of a file")
    name = Path(urlsplit(url).path).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / f"{digest[:12]}-{name}"
    if file.is_file():
        return file
    print(f"downloading {url} to {file}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"cannot download {url} ({error}); download it where that works and give the file as "
            "inception"
        ) from error
    return file
