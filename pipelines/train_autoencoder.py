"""Training of the autoencoder: its config, its step, and the two handed to the loop."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pipelines.corpus import Manifest
from pipelines.ingest import load_step
from pipelines.launch import launch, work
from pipelines.loop import Evaluation, Recipe
from pipelines.mixture import Corpus
from pipelines.packed_rows import PackedRow
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.reconstruction import (
    contact_sheet,
    evaluate_on_all_ranks,
    evaluation_rows,
    summarize,
)
from pipelines.runs import (
    CONFIG_FILE,
    RunConfig,
    claim_folder,
    latest_checkpoint,
    newest_checkpoint,
    next_step,
    read_run,
)
from pipelines.tracking import open_run
from vitok.autoencoder import Autoencoder, part_of
from vitok.config import config, flatten, require_choice
from vitok.flops import training_flops
from vitok.initialize import start_at_random, start_from_pca
from vitok.losses import LossConfig, ReconstructionLoss
from vitok.optim import OptimConfig
from vitok.parallel import require_float8
from vitok.patches import num_tokens
from vitok.pretrained import (
    EXPORT,
    WEIGHT_FILES,
    load_checkpoint,
    load_pretrained,
    save_pretrained,
)
from vitok.seeds import keyed_generator
from vitok.storage import Folder, absolute_if_local
from vitok.variants import AutoencoderConfig, Part

Freeze = Literal["none", "encoder"]

_PCA_PATCHES = 16_384
_NUM_PICTURES = 8
_FRESH_STARTS = ("random", "pca")
# What weights may have been trained with, and go on without.
_NOT_OF_WEIGHTS = ("layer_scale", "latent_noise")


@config
class AutoencoderTraining:
    """Everything that defines one training of an autoencoder.

    Attributes:
        model: shape of the autoencoder.
        data: training and held-out images.
        stages: schedule of token budgets; the learning rate follows the whole.
        loss: weights of the loss terms.
        optim: optimizer and learning rate.
        run: how and where it runs.
        start: `random` draws all weights; `pca` also sets the linear layers to a PCA of the
            patches; anything else is where weights of the same architecture are, as
            load_autoencoder takes it: a released model, a repository, a folder, a checkpoint, a
            run. The first worker reads them.
        freeze: `encoder` trains the decoder alone; the encoder's weights, and so its latents, stay
            what they are.
        eval_images: held-out images that an evaluation during training looks at.
        seed: of weights, order, crops and tiles.
    """

    model: AutoencoderConfig
    data: DataConfig
    stages: tuple[Stage, ...]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig
    start: str = "random"
    freeze: Freeze = "none"
    eval_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eval_images < 1:
            raise ValueError(f"eval_images={self.eval_images} must be at least 1")
        require_choice("freeze", self.freeze, Freeze)
        if not self.start:
            raise ValueError("start is empty; give random, pca, or where weights are")
        if self.freeze == "encoder" and self.start == "random":
            raise ValueError(
                "freeze='encoder' would keep an encoder of random weights; set start to where "
                "trained weights are, or to pca"
            )


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
    if settings.start not in _FRESH_STARTS and latest_checkpoint(settings.run.folder) is None:
        _check_weights(settings.start, settings.model)
    claim_folder(settings)
    return settings


def located(settings: AutoencoderTraining) -> AutoencoderTraining:
    """Return a config with absolute locations."""
    data, loss, run = settings.data, settings.loss, settings.run
    return replace(
        settings,
        data=replace(
            data,
            manifest=_absolute(data.manifest),
            sources=tuple(
                replace(source, manifest=_absolute(source.manifest)) for source in data.sources
            ),
            eval_manifest=_absolute(data.eval_manifest),
        ),
        loss=replace(
            loss,
            dino_weights=absolute_if_local(loss.dino_weights),
            lpips_weights=absolute_if_local(loss.lpips_weights),
        ),
        run=replace(run, storage=_absolute(run.storage)),
        start=settings.start
        if settings.start in _FRESH_STARTS
        else absolute_if_local(settings.start),
    )


def _check_weights(location: str, model: AutoencoderConfig) -> None:
    """Check that the weights of a model are at a location, without reading them."""
    try:
        found = load_autoencoder(location, meta=True).config
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"start={location!r} is neither {' nor '.join(_FRESH_STARTS)}, and there are no "
            f"weights: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"start={location!r} cannot be loaded: {error}") from error
    wanted, given = flatten(model), flatten(found)
    differences = [
        f"model.{name}={wanted[name]} where they have {given[name]}"
        for name in wanted
        if wanted[name] != given[name] and name not in _NOT_OF_WEIGHTS
    ]
    if differences:
        raise ValueError(
            f"the weights of start={location!r} are of another architecture "
            f"({', '.join(differences)}); change the model, or start from others"
        )


def _absolute(location: str) -> str:
    return Folder.of(location).uri if location else ""


def read_settings(folder: Folder) -> AutoencoderTraining:
    """Return the config of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is a run of another kind.
    """
    return read_run(folder, AutoencoderTraining)


def load_autoencoder(
    location: str,
    *,
    part: Part | None = None,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Autoencoder:
    """Load a model for use, in eval mode on the CPU.

    Args:
        location: a training run (its newest checkpoint is taken), or what load_pretrained takes: a
            folder of weights, a checkpoint, a released model, a Hugging Face repository.
        part: load the encoder or the decoder alone.
        dtype: of the weights.
        meta: read no weights: the model stays on the meta device once it is known that they fit.

    Raises:
        FileNotFoundError: there is none of these, or the run has no checkpoint yet.
        ValueError: the tensors are not those of the config; it is a run of another kind.
    """
    folder = Folder.of(location)
    has_weights = any(folder.exists(file) for file in WEIGHT_FILES)
    if has_weights or not folder.exists(CONFIG_FILE):
        return load_pretrained(location, part=part, dtype=dtype, meta=meta)
    if latest_checkpoint(folder) is None and folder.child(EXPORT).names():
        return load_pretrained(location, part=part, dtype=dtype, meta=meta)
    model = read_settings(folder).model
    checkpoint, _ = newest_checkpoint(folder)
    return load_checkpoint(checkpoint, model, part=part, dtype=dtype, meta=meta)


def export_weights(settings: AutoencoderTraining) -> Folder:
    """Write the run's newest weights for load_pretrained into its folder `export`."""
    run = settings.run.folder
    export, _ = export_run(run, run.child(EXPORT))
    return export


def export_run(run: Folder, target: Folder, *, average: bool = True) -> tuple[Folder, int]:
    """Write the weights of a run's newest checkpoint as a folder that load_pretrained takes.

    Args:
        target: what is in it already is replaced.
        average: the moving average of the weights where the run keeps one, else as they are.

    Returns:
        the target, and the steps that made the weights.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
    """
    settings = read_settings(run)
    checkpoint, metrics = newest_checkpoint(run)
    model = load_checkpoint(checkpoint, settings.model, average=average)
    with tempfile.TemporaryDirectory() as scratch:
        save_pretrained(Path(scratch), settings.model, model.state_dict())
        target.upload(Path(scratch))
    return target, int(metrics["cursor"]["step"])


def plan_of(settings: AutoencoderTraining) -> Plan:
    """Return the data plan of a training."""
    data = settings.data
    if not data.manifest and not data.sources:
        raise ValueError(
            "data.manifest is empty; make one with `vitok corpus index SHARDS --out FOLDER` and "
            "give it as --data.manifest FOLDER"
        )
    single = Corpus.of(Manifest.load(data.manifest)) if data.manifest else None
    return Plan(
        corpus=single or Corpus.mix(data.sources),
        data=data,
        stages=settings.stages,
        patch_size=settings.model.patch_size,
        seed=settings.seed,
    )


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


def initialize(model: Autoencoder, settings: AutoencoderTraining, plan: Plan) -> None:
    """Set a model, sharded or not, to the weights at the start of a training."""
    if settings.start not in _FRESH_STARTS:
        _start_from_weights(model, settings.start)
        return
    start_at_random(model, settings.seed)
    if settings.start == "pca":
        start_from_pca(model, _sample_patches(plan))


def _start_from_weights(model: Autoencoder, location: str) -> None:
    """Set a model to weights that rank 0 reads; it sends one parameter after another.

    So the store is read once, and the others hold no more than their shards and one parameter.
    """
    sends = dist.is_initialized()
    reads = not sends or dist.get_rank() == 0
    set_model_state_dict(
        model,
        load_autoencoder(location).state_dict() if reads else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=sends),
    )


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


def _sample_patches(plan: Plan) -> Tensor:
    """Return at least _PCA_PATCHES normalised patches [N, 3P^2] of the first steps, or all."""
    found: list[Tensor] = []
    for step in range(plan.num_steps):
        for row in load_step(plan, step):
            packed, _ = row.to_packed(torch.device("cpu"))
            found.append(packed.tokens[: row.num_tokens])
        if sum(len(patches) for patches in found) >= _PCA_PATCHES:
            break
    return torch.cat(found)
