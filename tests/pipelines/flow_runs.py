"""A small flow training on a made-up cache, and its plain form to compare with."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.caching.latent_corpus import LatentCorpus
from pipelines.caching.units import LatentRow, TextIdentity
from pipelines.ingest import load_step
from pipelines.runs import RunConfig
from pipelines.train_flow import FlowTraining, flow_step, plan_of, prepare
from pipelines.whole_images import Transform
from tests.pipelines.small_caches import (
    CHANNELS,
    IDENTITY,
    latent_rows,
    with_texts,
    write_small_cache,
)
from tests.vitok.text_encoders import save_text_encoder
from vitok.autoencoder import Autoencoder
from vitok.checkpoint import TrainState
from vitok.dit import DiT, DiTConfig
from vitok.flow import SamplerConfig
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig, build_optimizer, learning_rate
from vitok.pretrained import encoder_digest
from vitok.texts import TextEncoder
from vitok.variants import AutoencoderConfig

# Of a set of images that a core makes in seconds.
SMALL_SET: dict[str, Any] = {
    "seed": 100,
    "unit_images": 4,
    "row_tokens": 24,
    "num_workers": 2,
    "cpus_per_worker": 0.5,
    "use_gpu": False,
    "compute_dtype": "float32",
}
GRIDS = [(2, 3), (4, 4), (1, 5), (3, 3), (2, 2), (4, 1), (3, 5)]


def flow_training(
    folder: Path,
    grids: Sequence[tuple[int, int]] = GRIDS,
    text: TextIdentity | None = None,
    text_encoder: str = "",
) -> FlowTraining:
    """Return a training of 8 steps that a core does in seconds.

    Writes its autoencoder, which nobody trained, and four units of latents that it never saw.

    Args:
        text: latents have texts too, and the model is conditioned on them beside the classes.
        text_encoder: where the cache says that their encoder was.
    """
    autoencoder = small_autoencoder()
    autoencoder.save_pretrained(folder / "autoencoder")
    units: dict[str, list[LatentRow]] = {
        f"{unit:04d}": latent_rows(grids, seed=unit) for unit in range(4)
    }
    if text is not None:
        units = {name: with_texts(rows, int(name), text) for name, rows in units.items()}
    identity = replace(
        IDENTITY,
        transforms=(Transform(token_budget=16),),
        encoder_digest=encoder_digest(autoencoder),
        text=text,
    )
    write_small_cache(folder / "cache", units, identity, text_encoder)
    return FlowTraining(
        model=DiTConfig(
            latent_channels=CHANNELS,
            width=16,
            depth=2,
            heads=2,
            num_classes=len(grids) - 1,
            text_channels=text.channels if text else 0,
            text_tokens=text.max_tokens if text else 0,
            layer_scale=0.5,
            position_grid=4,
        ),
        cache=str(folder / "cache"),
        autoencoder=str(folder / "autoencoder"),
        steps=8,
        images_per_step=10,
        row_tokens=32,
        chunk_latents=4,
        optim=OptimConfig(lr=3e-3, warmup=0.3, ema_decay=0.9),
        run=RunConfig(
            name="flow",
            storage=str(folder / "runs"),
            num_workers=2,
            cpus_per_worker=0.5,
            use_gpu=False,
            compute_dtype="float32",
            log_every=1,
            evaluate_every=4,
            checkpoint_every=2,
            max_failures=2,
            mfu=False,
        ),
        sampler=SamplerConfig(steps=2, guidance=2.0),
        eval_images=3,
        eval_size=(32, 48),
    )


def small_autoencoder() -> Autoencoder:
    """Build an autoencoder of a few thousand weights."""
    config = AutoencoderConfig(
        patch_size=16,
        latent_channels=CHANNELS,
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    model = Autoencoder(config)
    start_at_random(model, seed=0)
    return model


def write_checkpoint(settings: FlowTraining) -> None:
    """Leave the newest checkpoint of a run whose velocity is not zero, and that nobody trained."""
    model = DiT(settings.model)
    start_at_random(model, seed=3)
    torch.nn.init.normal_(model.to_velocity.weight, std=0.3)
    run = settings.run.folder
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = TrainState(model, build_optimizer(model, settings.optim))
        state.save(Path(run.uri) / "step-00000008", {"cursor": {"step": 8}}).result()
    finally:
        dist.destroy_process_group()
    latest = {"checkpoint_dir_name": "step-00000008", "metrics": {"cursor": {"step": 8}}}
    snapshot = json.dumps({"latest_checkpoint_result": latest})
    run.write_text("checkpoint_manager_snapshot.json", snapshot)


def make_run_of_texts(folder: Path) -> FlowTraining:
    """Write a run with a checkpoint whose cache says where its text encoder is."""
    location = str(save_text_encoder(folder / "t5"))
    encoder = TextEncoder.load(location, option="text_encoder")
    text = TextIdentity(encoder_digest=encoder.digest, channels=encoder.channels, max_tokens=5)
    settings = prepare(flow_training(folder, text=text, text_encoder=location))
    write_checkpoint(settings)
    return settings


def train_plainly(settings: FlowTraining) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process without Ray, sharding or accumulation tricks: the reference.

    Returns:
        the mean loss of every step, and the final weights.
    """
    plan = plan_of(settings)
    assert isinstance(plan.corpus, LatentCorpus)
    model = DiT(settings.model)
    start_at_random(model, settings.seed)
    optimizer = build_optimizer(model, settings.optim)
    losses = []
    for step in range(plan.num_steps):
        rows = load_step(plan, step)
        images = sum(len(row.keys) for row in rows)
        assert images == settings.images_per_step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.optim, (step + 0.5) / settings.steps)
        terms = [
            flow_step(settings, plan.corpus, model, row, torch.device("cpu"))["loss"]
            for row in rows
        ]
        total = torch.stack(terms).sum()
        (total / images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / images)
    return losses, model.state_dict()
