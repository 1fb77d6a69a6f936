"""A generator that has only a few images to learn learns them: seen in pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.bench.photographs import decode_photographs, sample_patches
from pipelines.caching.latent_corpus import LatentCorpus
from pipelines.caching.units import LatentRow
from pipelines.corpus import Manifest
from pipelines.generation.sampling import Request, sample_requests
from pipelines.runs import RunConfig
from pipelines.train_flow import FlowTraining
from pipelines.whole_images import Transform
from tests.pipelines.flow_runs import train_plainly
from tests.pipelines.small_caches import IDENTITY, write_small_cache
from vitok.autoencoder import Autoencoder
from vitok.dit import DiT, DiTConfig
from vitok.flow import SamplerConfig
from vitok.images import to_tensor
from vitok.initialize import start_at_random, start_from_pca
from vitok.metrics import psnr
from vitok.optim import OptimConfig
from vitok.variants import AutoencoderConfig

NUM_IMAGES, SIDE, PATCH_SIZE, CHANNELS = 64, 64, 16, 32


def photographs(manifests: tuple[Path, Path]) -> list[Tensor]:
    """The middles of photographs, [3, SIDE, SIDE] in [-1, 1]."""
    found = []
    for path in manifests:
        pixels, unreadable = decode_photographs(Manifest.load(path), PATCH_SIZE, 64)
        assert not unreadable
        for image in pixels:
            top, left = ((length - SIDE) // 2 for length in image.shape[:2])
            found.append(to_tensor(image[top : top + SIDE, left : left + SIDE]))
    return [image for image in found if image.shape == (3, SIDE, SIDE)][:NUM_IMAGES]


def pca(images: list[Tensor]) -> Autoencoder:
    """An autoencoder without blocks that does a PCA of the images' patches."""
    config = AutoencoderConfig(
        patch_size=PATCH_SIZE,
        latent_channels=CHANNELS,
        encoder_width=128,
        encoder_depth=0,
        encoder_heads=2,
        decoder_width=128,
        decoder_depth=0,
        decoder_heads=2,
    )
    model = Autoencoder(config)
    start_at_random(model, seed=0)
    pixels = [np.uint8((image.permute(1, 2, 0).numpy() + 1) * 127.5) for image in images]
    start_from_pca(model, sample_patches(pixels, PATCH_SIZE))
    return model.eval()


def test_generator_draws_the_64_images_that_it_was_shown(
    sample_manifests: tuple[Path, Path], tmp_path: Path
) -> None:
    images = photographs(sample_manifests)
    assert len(images) == NUM_IMAGES
    autoencoder = pca(images)
    latents = autoencoder.encode(images)
    grid = SIDE // PATCH_SIZE
    rows = [
        LatentRow(
            key=str(label),
            latent=latent.tokens,
            grid=(grid, grid),
            image_size=(SIDE, SIDE),
            label=label,
        )
        for label, latent in enumerate(latents)
    ]
    identity = replace(
        IDENTITY, transforms=(Transform(square=SIDE),), channels=CHANNELS, patch_size=PATCH_SIZE
    )
    write_small_cache(tmp_path / "cache", {"unit": rows}, identity)
    settings = FlowTraining(
        model=DiTConfig(
            latent_channels=CHANNELS,
            width=128,
            depth=3,
            heads=2,
            num_classes=NUM_IMAGES,
            layer_scale=0.5,
            position_grid=grid,
        ),
        cache=str(tmp_path / "cache"),
        steps=150,
        images_per_step=NUM_IMAGES,
        row_tokens=NUM_IMAGES * grid**2,
        label_dropout=0.0,
        optim=OptimConfig(algorithm="muon", lr=1e-2, weight_decay=0.0, warmup=0.05),
        run=RunConfig(name="overfit", storage=str(tmp_path), num_workers=1, use_gpu=False),
    )
    losses, weights = train_plainly(settings)
    assert losses[-1] < 0.2 * losses[0]
    model = DiT(settings.model)
    model.load_state_dict(weights)
    samples = sample_requests(
        model.eval(),
        [Request(seed=label, label=label, size=(SIDE, SIDE)) for label in range(NUM_IMAGES)],
        LatentCorpus(settings.cache).statistics,
        torch.device("cpu"),
        sampler=SamplerConfig(steps=20, guidance=1.0),
        times=settings.times,
        row_tokens=settings.row_tokens,
    )
    drawn = autoencoder.decode(samples)
    likeness = torch.tensor([[psnr(image, source) for source in images] for image in drawn])
    recognised = int((likeness.argmax(dim=1) == torch.arange(NUM_IMAGES)).sum())
    quality = likeness.diagonal().tolist()
    best = [psnr(i, s) for i, s in zip(autoencoder.decode(latents), images, strict=True)]
    assert recognised >= NUM_IMAGES - 4
    assert np.mean(quality) > 20 and np.mean(best) - np.mean(quality) < 5
