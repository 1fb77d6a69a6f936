"""A TorchScript file with the interface of the field's Inception-v3, and random weights."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


class RandomInception(nn.Module):
    """Called as inception-2015-12-05.pt is: uint8 [N, 3, H, W] to features or probabilities."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, dim, 8, stride=8), nn.ReLU())
        self.output = nn.Linear(dim, num_classes)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        pixels = nn.functional.interpolate(img.float(), size=[64, 64], mode="bilinear")
        features = self.layers((pixels - 128) / 128).mean(dim=[2, 3])
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


def write_inception(file: Path, dim: int = 12, num_classes: int = 5) -> tuple[Path, str]:
    """Write such a file; returns its path and sha256."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RandomInception(dim, num_classes)
        network.output.weight.data.mul_(20)
        network.output.bias.data.add_(torch.arange(float(num_classes)))
    torch.jit.script(network.eval()).save(str(file))
    return file, hashlib.sha256(file.read_bytes()).hexdigest()
