"""Training of a flow model on cached latents: its config and its step, handed to the loop."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.caching.latent_corpus import LatentCorpus, LatentStatistics
from pipelines.failures import Unrecoverable
from pipelines.generation.sampling import (
    Request,
    conditions_of_latents,
    draw_sheet,
    sample_requests,
    spread_classes,
    whole_patches,
)
from pipelines.latents import LatentCache
from pipelines.launch import launch, work
from pipelines.loop import Evaluation, Recipe
from pipelines.packed_rows import PackedRow
from pipelines.plan import DataConfig, Plan, Stage
from pipelines.runs import RunConfig, claim_folder, read_run
from pipelines.tracking import open_run
from vitok.autoencoder import Autoencoder
from vitok.config import config, parse_json, to_dict
from vitok.dit import Condition, DiT, DiTConfig
from vitok.flops import training_flops
from vitok.flow import SamplerConfig, TimeConfig, draw_for_images, flow_loss
from vitok.images import Latent
from vitok.initialize import start_at_random
from vitok.optim import OptimConfig
from vitok.parallel import require_float8
from vitok.pretrained import encoder_digest
from vitok.storage import Folder, absolute_if_local

STATISTICS_FILE = "latents.json"


@config
class FlowTraining:
    """Everything that defines one training of a flow model.

    Attributes:
        model: shape of the velocity model.
        cache: folder or `s3://` prefix that `vitok encode` wrote: the latents, with their classes
            and texts.
        autoencoder: the model whose encoder made the cache, as load_autoencoder takes it; its
            decoder shows samples during training. Empty shows none.
        steps: optimizer steps.
        images_per_step: latents of a global step, over all workers.
        row_tokens: tokens of a packed row, the unit of one forward pass.
        chunk_latents: neighbours that stay together when an epoch is shuffled, so that they are
            read in one request.
        label_dropout: share of the images that train the null condition instead of their class or
            text.
        times: which times are trained, and how sampling steps are spread.
        optim: optimizer and learning rate.
        run: how and where it runs.
        sampler: of the samples that an evaluation shows.
        eval_images: how many these are, of classes spread over all; or of the texts of the cache's
            first images.
        eval_size: their size in pixels (height, width).
        seed: of weights, order, times and noise.
    """

    model: DiTConfig
    cache: str = ""
    autoencoder: str = ""
    steps: int
    images_per_step: int
    row_tokens: int = 8192
    chunk_latents: int = 16
    label_dropout: float = 0.1
    times: TimeConfig = TimeConfig()
    optim: OptimConfig = OptimConfig(lr=1e-3, ema_decay=0.999)
    run: RunConfig
    sampler: SamplerConfig = SamplerConfig()
    eval_images: int = 16
    eval_size: tuple[int, int] = (256, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout={self.label_dropout} must be from 0 to 1")
        if self.eval_images < 1 or min(self.eval_size) < 1:
            raise ValueError(
                f"eval_images={self.eval_images} and eval_size={self.eval_size} must be positive"
            )


def prepare(settings: FlowTraining) -> FlowTraining:
    """Check what can be checked before anything starts, and claim the run's folder.

    Returns:
        the config to run, with absolute locations: workers run in other directories.

    Raises:
        FileNotFoundError: the cache, or the autoencoder, is not there.
        ImportError: float8 needs a package that is not installed.
        ValueError: the cache has other channels than the model, or was made by another encoder, or
            has not the texts that the model is conditioned on; the run's folder holds a run with
            another config.
    """
    if not settings.cache:
        raise ValueError(
            "cache is empty; make one with `vitok encode` and give its folder as --cache FOLDER"
        )
    settings = replace(
        settings,
        cache=Folder.of(settings.cache).uri,
        autoencoder=absolute_if_local(settings.autoencoder),
        run=replace(settings.run, storage=Folder.of(settings.run.storage).uri),
    )
    corpus = corpus_of(settings)
    channels = corpus.identity.channels
    if channels != settings.model.latent_channels:
        raise ValueError(
            f"model.latent_channels={settings.model.latent_channels}, but the latents of "
            f"{corpus.location} have {channels}; set it to that, or take another cache"
        )
    _require_texts(settings.model, corpus)
    if settings.autoencoder:
        encoder = load_autoencoder(settings.autoencoder, part="encoder")
        LatentCache(settings.cache, encoder_digest(encoder))
    plan_of(settings)
    if settings.run.parallel.float8:
        require_float8(settings.row_tokens)
    claim_folder(settings)
    settings.run.folder.write_text(
        STATISTICS_FILE, json.dumps(to_dict(corpus.statistics), indent=1) + "\n"
    )
    return settings


def _require_texts(model: DiTConfig, corpus: LatentCorpus) -> None:
    """Check that a cache has the texts that a model is conditioned on, if it is.

    Raises:
        ValueError: it has none, or such of another shape.
    """
    wanted = f"model.text_channels={model.text_channels} and model.text_tokens={model.text_tokens}"
    found = corpus.identity.text
    if model.text_channels == 0:
        return
    if found is None or corpus.manifest.num_texts == 0:
        raise ValueError(
            f"{wanted}, but {corpus.location} holds no texts; make a cache with `vitok encode "
            "--text-encoder`, or set both to 0"
        )
    if (model.text_channels, model.text_tokens) != (found.channels, found.max_tokens):
        raise ValueError(
            f"{wanted}, but the texts of {corpus.location} have {found.channels} channels and at "
            f"most {found.max_tokens} tokens; set them to that, or take another cache"
        )


def run_training(settings: FlowTraining) -> Folder:
    """Train on the connected Ray cluster, or continue the run of this name.

    Args:
        settings: as `prepare` returned it.

    Returns:
        the run's folder, which `vitok sample` takes.

    Raises:
        RuntimeError: the workers failed more often than allowed; says why.
    """
    run = settings.run
    with open_run(run.folder, run.name, run.tracking, run.storage, settings) as tracker:
        launch(_worker, settings, plan_of(settings), tracker)
    return run.folder


def read_settings(run: Folder) -> FlowTraining:
    """Return the config of the flow training in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is a run of another kind.
    """
    return read_run(run, FlowTraining)


def read_statistics(run: Folder) -> LatentStatistics:
    """Return what a run noted of its cache, which samples need when the cache is gone."""
    text = run.read_bytes(STATISTICS_FILE).decode()
    return parse_json(LatentStatistics, text, f"{run.uri}/{STATISTICS_FILE}")


def corpus_of(settings: FlowTraining) -> LatentCorpus:
    """Return the latents of a training."""
    return LatentCorpus(settings.cache, texts=bool(settings.model.text_channels))


def plan_of(settings: FlowTraining) -> Plan:
    """Return the data plan of a training: every latent whole, as it was encoded."""
    corpus = corpus_of(settings)
    return Plan(
        corpus=corpus,
        data=DataConfig(row_tokens=settings.row_tokens, chunk_samples=settings.chunk_latents),
        stages=(
            Stage(
                steps=settings.steps,
                images_per_step=settings.images_per_step,
                token_budgets=(corpus.max_tokens,),
            ),
        ),
        patch_size=corpus.statistics.patch_size,
        seed=settings.seed,
    )


def build_model(settings: FlowTraining) -> DiT:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return DiT(settings.model)


def flow_step(
    settings: FlowTraining,
    corpus: LatentCorpus,
    model: nn.Module,
    row: PackedRow,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the summed loss of one packed row.

    Time, noise and dropout of an image are keyed by seed, step and sample: neither the packing nor
    the number of workers nor a resume changes them.

    Raises:
        Unrecoverable: a class is none of the model's.
    """
    most = int(row.label.max(initial=-1))
    if most >= settings.model.num_classes > 0:
        raise Unrecoverable(
            f"{corpus.location} has an image of class {most}, but model.num_classes="
            f"{settings.model.num_classes}; raise it to the number of classes"
        )
    draws = draw_for_images(
        [f"{settings.seed}/{row.step}/{key}" for key in row.keys],
        row.image_tokens[: len(row.keys)],
        row_tokens=len(row.tokens),
        slots=len(row.image_size),
        channels=settings.model.latent_channels,
    )
    return flow_loss(
        model,
        corpus.to_packed(row, device),
        condition_of_row(corpus, row, device),
        draws.to(device),
        settings.times,
        dropout=settings.label_dropout,
    )


def condition_of_row(corpus: LatentCorpus, row: PackedRow, device: torch.device) -> Condition:
    """Return what the images of a row are conditioned on, on the device."""
    labels = torch.from_numpy(row.label).to(device, non_blocking=True)
    if row.texts is None:
        return Condition(labels=labels)
    return Condition(
        labels=labels,
        text=corpus.to_embeddings(row.texts, device),
        text_tokens=torch.from_numpy(row.texts.num_tokens).to(device, non_blocking=True),
    )


def shown_requests(settings: FlowTraining, corpus: LatentCorpus) -> list[Request]:
    """Return the samples that every evaluation shows: the same seeds, so that they compare.

    Their classes are spread over all; a model of texts is given those of the cache's first images,
    with their classes.
    """
    size = whole_patches(settings.eval_size, corpus.identity.patch_size)
    model = settings.model
    if model.text_channels:
        first = np.arange(min(settings.eval_images, len(corpus)))
        conditions = conditions_of_latents(corpus, first, model)
        return [Request(seed, label, size, text) for seed, (label, text) in enumerate(conditions)]
    classes = spread_classes(settings.eval_images, model.num_classes)
    return [Request(seed, label, size) for seed, label in enumerate(classes)]


def sample_on_all_ranks(
    model: nn.Module,
    settings: FlowTraining,
    requests: Sequence[Request],
    statistics: LatentStatistics,
    device: torch.device,
) -> list[Latent]:
    """Share the samples of an evaluation among the ranks, which a sharded model needs.

    Called by every rank; complete on all of them.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Each forward pass is a collective: every rank samples as many images, some of them twice.
    each = -(-len(requests) // world_size)
    mine = [requests[(rank + i * world_size) % len(requests)] for i in range(each)]
    latents = sample_requests(
        model,
        mine,
        statistics,
        device,
        sampler=settings.sampler,
        times=settings.times,
        row_tokens=settings.row_tokens,
    )
    gathered: list[list[Latent]] = [[] for _ in range(world_size)]
    dist.all_gather_object(gathered, latents)
    in_turn = [part[i] for i in range(each) for part in gathered]
    return in_turn[: len(requests)]


def _worker(given: dict[str, Any]) -> None:
    settings: FlowTraining = given["settings"]
    plan = plan_of(settings)
    corpus = plan.corpus
    assert isinstance(corpus, LatentCorpus)
    decoder: Autoencoder | None = None
    if settings.autoencoder and ray.train.get_context().get_world_rank() == 0:
        decoder = load_autoencoder(settings.autoencoder, part="decoder")
    requests = shown_requests(settings, corpus) if settings.autoencoder else []

    def step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
        return flow_step(settings, corpus, model, row, device)

    def evaluate(model: nn.Module, device: torch.device) -> Evaluation:
        latents = sample_on_all_ranks(model, settings, requests, corpus.statistics, device)
        return Evaluation({}, {"samples": draw_sheet(decoder, latents)} if decoder else {})

    recipe = Recipe(
        step=step,
        flops=lambda row: training_flops(settings.model, row.image_tokens),
        initialize=lambda model: start_at_random(model, settings.seed),
        evaluate=evaluate if settings.autoencoder else None,
    )
    work(given, build_model(settings), recipe, plan)
