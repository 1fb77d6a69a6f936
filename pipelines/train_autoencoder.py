"""Training of the autoencoder: its step, which it hands to the loop."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor, nn

from pipelines.autoencoder_training import FRESH_STARTS, AutoencoderTraining, located, plan_of
from pipelines.autoencoder_weights import check_weights, export_weights, initialize
from pipelines.corpus import Manifest
from pipelines.launch import launch, work
from pipelines.loop import Evaluation, Recipe
from pipelines.packed_rows import PackedRow
from pipelines.reconstruction import (
    contact_sheet,
    evaluate_on_all_ranks,
    evaluation_rows,
    summarize,
)
from pipelines.runs import claim_folder, latest_checkpoint, next_step
from pipelines.tracking import open_run
from vitok.autoencoder import Autoencoder, part_of
from vitok.config import flatten
from vitok.flops import training_flops
from vitok.losses import ReconstructionLoss
from vitok.parallel import require_float8
from vitok.patches import num_tokens
from vitok.seeds import keyed_generator
from vitok.storage import Folder

_NUM_PICTURES = 8


def run_training(
    settings: AutoencoderTraining, callbacks: Sequence[ray.train.UserCallback] = ()
) -> Folder:
    """Train on the connected Ray cluster, or continue the run of this name, and export weights.

    Args:
        settings: as `prepare` returned it.
        callbacks: told of every checkpoint, in Ray Train's controller.

    Returns:
        the folder of the exported weights.

    Raises:
        RuntimeError: the workers failed more often than allowed; says why.
    """
    run = settings.run
    with open_run(run.folder, run.name, run.tracking, run.storage, settings) as tracker:
        launch(_worker, settings, plan_of(settings), tracker, callbacks)
        export = export_weights(settings)
        tracker.set_tags({"export": export.uri})
        if run.tracking.upload_weights:
            with tempfile.TemporaryDirectory() as scratch:
                tracker.log_files(export.download(Path(scratch)), "weights")
        if run.tracking.registered_model:
            tracker.register_model(
                run.tracking.registered_model,
                f"runs:/{tracker.run_id}/weights",
                step=next_step(run.folder),
                tags={name: str(value) for name, value in flatten(settings.model).items()},
                description=f"exported from {run.folder.uri}",
            )
    return export


def prepare(settings: AutoencoderTraining) -> AutoencoderTraining:
    """Check what can be checked before anything starts, and claim the run's folder.

    Returns:
        the config to run, with absolute locations: workers run in other directories.

    Raises:
        FileNotFoundError: a manifest, the weights to start from, or those of a perceptual loss, are
            not there.
        ImportError: a perceptual loss needs a package that is not installed.
        ValueError: the weights to start from are of another architecture; the run's folder holds a
            run with another config.
    """
    settings = located(settings)
    data, loss, run = settings.data, settings.loss, settings.run
    plan_of(settings)
    if data.eval_manifest:
        Manifest.load(data.eval_manifest)
    if loss.dino or loss.lpips:
        ReconstructionLoss(loss)
    if run.parallel.float8:
        require_float8(data.row_tokens)
    # A run that goes on reads its own weights.
    if settings.start not in FRESH_STARTS and latest_checkpoint(settings.run.folder) is None:
        check_weights(settings.start, settings.model)
    claim_folder(settings)
    return settings


def build_model(settings: AutoencoderTraining) -> Autoencoder:
    """Return the model on the meta device; what is frozen requires no gradient.

    No gradient flows through a frozen encoder, whose input requires none either: its pass forward
    keeps nothing, and there is none backward.
    """
    with torch.device("meta"):
        model = Autoencoder(settings.model)
    if settings.freeze == "encoder":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) != "encoder")
    return model


def row_flops(settings: AutoencoderTraining, row: PackedRow) -> float:
    """Return the operations of a training step on a row."""
    return image_flops(settings, row.image_tokens)


def image_flops(settings: AutoencoderTraining, image_tokens: Iterable[int]) -> float:
    """Return the operations of a training step on images; a frozen encoder has a forward alone."""
    if settings.freeze == "none":
        return training_flops(settings.model, image_tokens)
    tokens = list(image_tokens)
    encoder = training_flops(settings.model, tokens, "encoder") / 3
    return encoder + training_flops(settings.model, tokens, "decoder")


def reconstruction_step(
    settings: AutoencoderTraining,
    loss: ReconstructionLoss,
    model: nn.Module,
    row: PackedRow,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the summed loss terms of one packed row."""
    packed, tile_position = row.to_packed(device)
    reconstruction = model(packed, noise=latent_noise(settings, row, device))
    return loss(reconstruction, packed, tile_position)


def latent_noise(
    settings: AutoencoderTraining, row: PackedRow, device: torch.device
) -> Tensor | None:
    """Return standard normal noise [T, c] for latents that are trained with noise, or None.

    Every image has a generator of its own, keyed by seed, step and sample: neither the packing nor
    the number of workers nor a resume changes its noise.
    """
    if settings.model.latent == "layernorm":
        return None
    noise = torch.zeros(len(row.tokens), settings.model.latent_channels)
    start = 0
    for key, (height, width) in zip(row.keys, row.image_size.tolist(), strict=False):
        generator = keyed_generator(settings.seed, row.step, key)
        stop = start + num_tokens(height, width, row.patch_size)
        noise[start:stop] = torch.randn(stop - start, noise.shape[1], generator=generator)
        start = stop
    return noise.to(device)


def _worker(given: dict[str, Any]) -> None:
    settings: AutoencoderTraining = given["settings"]
    plan = plan_of(settings)
    device = ray.train.torch.get_device()
    loss = ReconstructionLoss(settings.loss).to(device)
    held_out: list[PackedRow] = []
    if settings.data.eval_manifest:
        held_out = evaluation_rows(
            Manifest.load(settings.data.eval_manifest),
            patch_size=plan.patch_size,
            token_budget=max(settings.stages[-1].token_budgets),
            row_tokens=settings.data.row_tokens,
            max_images=settings.eval_images,
        )

    def step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
        return reconstruction_step(settings, loss, model, row, device)

    def evaluate(model: nn.Module, device: torch.device) -> Evaluation:
        results, pictures = evaluate_on_all_ranks(model, held_out, device, _NUM_PICTURES)
        images = {"reconstructions": contact_sheet(pictures)} if pictures else {}
        return Evaluation(summarize(results), images)

    recipe = Recipe(
        step=step,
        flops=lambda row: row_flops(settings, row),
        initialize=lambda model: initialize(model, settings, plan),
        evaluate=evaluate if held_out else None,
    )
    work(given, build_model(settings), recipe, plan)
