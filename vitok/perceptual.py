"""Perceptual losses: distances of a frozen network's features on random 224 x 224 tiles.

A tile lies at the same place in a reconstruction and its source. An image smaller than a tile is
padded with gray (0) in both, so that nothing counts that is not image. Every loss is summed over
the images of the row.
"""

from math import isqrt
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitok.networks import load_network
from vitok.packed import PackedTokens
from vitok.tiles import gather_tiles

TILE = 224  # pixels; a multiple of DINOv3's patch of 16
DINO_REPOSITORY = "facebook/dinov3-vits16-pretrain-lvd1689m"
# The IMAGENET1K_V1 weights of torchvision, which LPIPS was fitted to, as safetensors.
VGG_REPOSITORY = "timm/vgg16.tv_in1k"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_NORM_EPS = 1e-6


def load_dino(weights: str, option: str) -> nn.Module:
    """Load DINOv3 from a folder or a Hugging Face repository that is already on this machine.

    Args:
        option: what the user sets, for the messages.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are of another network, or not whole.
    """
    return load_network(
        "DINOv3ViTModel",
        weights,
        what="DINOv3",
        remedy=f"request access to {DINO_REPOSITORY} on Hugging Face, download it with "
        f"`hf download {DINO_REPOSITORY} --local-dir FOLDER`, and set {option} to FOLDER",
    )


class _TileLoss(nn.Module):
    """Distance of one tile of every image from its original, in the eyes of a frozen network.

    Gradients flow through the network into the reconstruction.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: in training DINOv3 jitters its positions, and LPIPS drops channels."""
        return super().train(False)

    def forward(self, output: PackedTokens, target: PackedTokens, tile_position: Tensor) -> Tensor:
        with torch.no_grad():
            target_tiles = _tiles(target, tile_position)
        distance_S = self._distance(_tiles(output, tile_position), target_tiles)
        # Slots without an image count 0, whatever is said of them.
        return torch.where(target.grid[:, 0] > 0, distance_S, 0.0).sum()

    def _distance(self, output_tiles: Tensor, target_tiles: Tensor) -> Tensor:
        """Return the distances [S] of tiles [S, 3, TILE, TILE] in [-1, 1]."""
        raise NotImplementedError


class DinoTileLoss(_TileLoss):
    """Distance of DINOv3 features (arXiv 2605.05331).

    Features of every block, before the final norm, of all tokens (class, registers and patches),
    L2-normalised per token; mean squared difference over tokens and channels, mean over blocks.
    This is what the package dino-perceptual computes.

    Args:
        network: a transformers DINOv3ViTModel, in any precision.
    """

    @classmethod
    def from_pretrained(cls, weights: str) -> Self:
        """Load DINOv3 from a folder or a Hugging Face repository that is already on this machine.

        Raises:
            FileNotFoundError: the weights are not there.
            ValueError: they are of another network, or not whole.
        """
        return cls(load_dino(weights, option="loss.dino_weights"))

    def _distance(self, output_tiles: Tensor, target_tiles: Tensor) -> Tensor:
        with torch.no_grad():
            target_features = self._features(target_tiles)
        output_features = self._features(output_tiles)
        return torch.stack(
            [
                (a - b).square().mean(dim=(1, 2))
                for a, b in zip(output_features, target_features, strict=True)
            ]
        ).mean(dim=0)

    def _features(self, tiles: Tensor) -> list[Tensor]:
        pixels = imagenet_normalized((tiles + 1) / 2)
        states = self.network(pixels, output_hidden_states=True).hidden_states
        # The first is the input of the first block.
        return [
            nn.functional.normalize(state.float(), dim=-1, eps=_NORM_EPS) for state in states[1:]
        ]


def imagenet_normalized(pixels: Tensor) -> Tensor:
    """Shift and scale the channels of pixels [N, 3, H, W] in [0, 1] as ImageNet networks expect."""
    # Channel by channel with plain numbers: buffers would be rounded by `.to(bfloat16)`.
    channels = zip(pixels.unbind(1), _IMAGENET_MEAN, _IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def load_lpips(weights: str, option: str, without: str) -> nn.Module:
    """Build LPIPS of the package's linear layers and a file of VGG16; downloads nothing.

    Args:
        weights: torchvision's VGG16 state dict (features.0.weight, ...) as a safetensors file.
        option: what the user sets, for the messages.
        without: what the user does to go without LPIPS, for the messages.

    Raises:
        ImportError: the package, or a torchvision that fits this torch, is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors, or holds another network.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # the latter from an unfitting torchvision
        raise ImportError(
            "LPIPS needs the package lpips and a torchvision that fits this torch; install them "
            f"with `pip install lpips`, or {without}"
        ) from error
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"no VGG16 weights at {weights!r}; download them with `hf download "
            f"{VGG_REPOSITORY} model.safetensors --local-dir FOLDER`, and set "
            f"{option} to FOLDER/model.safetensors"
        )
    # Without pnet_rand the package downloads VGG16 as it is built.
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    network.net.load_state_dict(_read_vgg(weights, list(network.net.state_dict())))
    return network.eval().requires_grad_(False)


class LpipsTileLoss(_TileLoss):
    """LPIPS (arXiv 1801.03924; VGG16, version 0.1), for ablations.

    It divides by the square root of a sum of squares, which
    has no gradient where all channels of a layer are 0. We have not seen that on an image; the
    training loop stops at a gradient that is not finite.

    Args:
        network: called as lpips.LPIPS is: two batches [N, 3, n, n] in [-1, 1] to [N, 1, 1, 1].
    """

    @classmethod
    def from_pretrained(cls, weights: str) -> Self:
        """Build LPIPS, as load_lpips does."""
        return cls(load_lpips(weights, option="loss.lpips_weights", without="set loss.lpips to 0"))

    def _distance(self, output_tiles: Tensor, target_tiles: Tensor) -> Tensor:
        distance_S: Tensor = self.network(output_tiles, target_tiles).flatten()
        return distance_S.float()


def _read_vgg(weights: str, names: list[str]) -> dict[str, Tensor]:
    """Read the tensors of VGG16 under LPIPS's names: its slice3.12.bias is our features.12.bias."""
    sources = {name: f"features.{name.split('.', 1)[1]}" for name in names}
    try:
        with safe_open(weights, framework="pt") as file:
            missing = sorted(set(sources.values()) - set(file.keys()))
            if missing:
                raise ValueError(
                    f"{weights} does not hold VGG16 in torchvision's names: {missing[0]} is "
                    f"missing; use model.safetensors of {VGG_REPOSITORY}"
                )
            return {name: file.get_tensor(source) for name, source in sources.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is no safetensors file ({error}); use model.safetensors of {VGG_REPOSITORY}"
        ) from error


def _tiles(packed: PackedTokens, position: Tensor) -> Tensor:
    """Cut one tile [S, 3, 224, 224] out of every image."""
    patch_size = isqrt(packed.tokens.shape[1] // 3)
    tiles, _ = gather_tiles(packed, position, -(-TILE // patch_size))
    return tiles[..., :TILE, :TILE]
