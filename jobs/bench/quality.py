"""Benchmark of time to quality: how good an autoencoder becomes in a few minutes of training."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jobs.bench.data import SAMPLE_VARIABLE
from jobs.bench.output import finish
from jobs.bench.photographs import Crops, decode_photographs, sample_patches
from jobs.bench.quality_recipe import QualityRecipe, ten_minutes_on_two_cores
from jobs.sample_corpus import make_sample_corpus
from pipelines.corpus import Manifest, build_manifest, expand_shards
from pipelines.loop import Recipe, train_step
from pipelines.packed_rows import PackedRow, StepRows
from pipelines.reconstruction import (
    contact_sheet,
    evaluate_on_all_ranks,
    evaluate_rows,
    evaluation_rows,
    summarize,
)
from vitok.autoencoder import Autoencoder, Reconstruction
from vitok.flops import training_flops
from vitok.initialize import (
    attend_to_neighbors,
    principal_components,
    start_at_random,
    start_from_pca,
)
from vitok.losses import sum_of_image_means
from vitok.optim import build_optimizer, learning_rate
from vitok.packed import PackedTokens
from vitok.parallel import ParallelConfig, prepare_blocks, shard_model
from vitok.variants import AutoencoderConfig

_NUM_PICTURES = 8
_REPORT_S = 20.0


@dataclass(frozen=True)
class _Task:
    """What every worker is given; times are those of `time.monotonic`, one clock for them all."""

    model: AutoencoderConfig
    recipe: QualityRecipe
    train_manifest: str
    eval_manifest: str
    started: float
    deadline: float
    max_steps: int
    picture: str
    quiet: bool
    folder: str


def run(
    minutes: float = 10.0,
    train_shards: tuple[str, ...] = (),
    eval_shards: tuple[str, ...] = (),
    width: int = 256,
    heads: int = 4,
    encoder_depth: int = 2,
    decoder_depth: int = 4,
    patch_size: int = 16,
    latent_channels: int = 16,
    workers: int = 1,
    max_steps: int = 0,
    picture: str = "",
    json: bool = False,
) -> None:
    """PSNR and SSIM on held-out photographs after a few minutes of training, beside those of a PCA.

    Args:
        minutes: from the start of the workers to the end of the last step.
        train_shards: WebDataset shards: files, folders, globs or URIs; if empty seven eighths of
            those that the environment variable VITOK_SAMPLE names, else the quickstart's corpus.
        eval_shards: held-out shards; the other eighth if empty. Whole images at 256 tokens.
        width: channels of the encoder's and the decoder's tokens.
        heads: attention heads of both.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        patch_size: pixels along each side of a patch.
        latent_channels: channels of a patch's latent, which is normalised by LayerNorm.
        workers: processes that train together and share the cores.
        max_steps: end after so many steps, which the schedule then follows too; 0 for no such end.
        picture: PNG file for originals, reconstructions and error maps; none if empty.
        json: print the JSON alone.
    """

    def show(line: str) -> None:
        if not json:
            print(line, flush=True)

    model = AutoencoderConfig(
        patch_size=patch_size,
        latent_channels=latent_channels,
        encoder_width=width,
        encoder_depth=encoder_depth,
        encoder_heads=heads,
        decoder_width=width,
        decoder_depth=decoder_depth,
        decoder_heads=heads,
    )
    figures = measure_quality(
        model=model,
        recipe=ten_minutes_on_two_cores(),
        train_shards=train_shards,
        eval_shards=eval_shards,
        minutes=minutes,
        max_steps=max_steps,
        num_workers=workers,
        picture=picture,
        quiet=json,
    )
    show(f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}")
    show(
        f"a PCA of the patches to {latent_channels} channels: "
        f"PSNR {figures['pca_psnr']:.2f} dB, SSIM {figures['pca_ssim']:.4f}"
    )
    show(f"{figures['steps']} steps, {figures['tokens_per_s']:.0f} tokens/s")
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
    finish("quality", {"minutes": minutes, **rounded}, threads=workers)


def measure_quality(
    *,
    model: AutoencoderConfig,
    recipe: QualityRecipe,
    train_shards: Sequence[str],
    eval_shards: Sequence[str],
    minutes: float,
    max_steps: int,
    num_workers: int,
    picture: str,
    quiet: bool,
) -> dict[str, Any]:
    """Train for some time, and judge the result and a PCA on the same held-out images.

    The time starts before the workers are, so that their start, the decoding of the photographs and
    the PCA count, and ends with the last step. What comes before (an index of the shards) and after
    (evaluation) does not.

    Args:
        minutes: the training ends with the first step that is done after so long.
        max_steps: or after so many steps, which the schedule then follows too; 0 for no such limit.
        picture: file for a picture of some reconstructions; none if empty.
        quiet: report no progress.

    Returns:
        the figures of the benchmark by name.

    Raises:
        ValueError: minutes is not positive, or a shard is both trained on and evaluated.
    """
    if minutes <= 0:
        raise ValueError(f"{minutes=} must be positive")
    with tempfile.TemporaryDirectory(prefix="vitok-bench-") as scratch:
        train, held_out = _manifests(train_shards, eval_shards, Path(scratch))
        started = time.monotonic()
        task = _Task(
            model=model,
            recipe=recipe,
            train_manifest=str(train),
            eval_manifest=str(held_out),
            started=started,
            deadline=started + 60 * minutes,
            max_steps=max_steps,
            picture=picture,
            quiet=quiet,
            folder=scratch,
        )
        torch.multiprocessing.spawn(_worker, (num_workers, task), nprocs=num_workers)
        figures = json.loads((Path(scratch) / "figures.json").read_text())
        return figures | pca_figures(train, held_out, model, recipe.token_budget)


def _manifests(
    train_shards: Sequence[str], eval_shards: Sequence[str], folder: Path
) -> tuple[Path, Path]:
    """Index what is trained on and what is evaluated, by default an eighth of the shards."""
    if bool(train_shards) != bool(eval_shards):
        raise ValueError(
            "train_shards and eval_shards go together; give both, or neither for the shards that "
            f"{SAMPLE_VARIABLE} names"
        )
    if not train_shards and SAMPLE_VARIABLE not in os.environ:
        return make_sample_corpus(folder / "corpus")
    train, held_out = expand_shards(train_shards or [os.environ[SAMPLE_VARIABLE]]), []
    if eval_shards:
        held_out = expand_shards(eval_shards)
    elif len(train) > 1:
        num_held_out = -(-len(train) // 8)
        train, held_out = train[:-num_held_out], train[-num_held_out:]
    else:
        raise ValueError(
            f"{train[0]} is the only shard; give others to evaluate on as eval_shards, or point "
            f"{SAMPLE_VARIABLE} to at least two"
        )
    manifests = (build_manifest(train, folder / "train"), build_manifest(held_out, folder / "eval"))
    digests = [set(manifest.shard_digests.tolist()) for manifest in manifests]
    if digests[0] & digests[1]:
        raise ValueError(
            "a shard of eval_shards is among train_shards, by its content; what is evaluated must "
            "not have been trained on"
        )
    return manifests[0].path, manifests[1].path


def _worker(rank: int, num_workers: int, task: _Task) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    store = dist.FileStore(f"{task.folder}/store", num_workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)
    try:
        figures = _train_and_judge(init_device_mesh("cpu", (num_workers,)), task)
        if rank == 0:
            (Path(task.folder) / "figures.json").write_text(json.dumps(figures))
    finally:
        dist.destroy_process_group()


def _train_and_judge(mesh: DeviceMesh, task: _Task) -> dict[str, Any]:
    """Do what a worker does: all of it but the index of the shards and the PCA to compare with."""
    recipe, device = task.recipe, torch.device("cpu")
    patch_size, rank = task.model.patch_size, mesh.get_rank()
    photographs, num_skipped = decode_photographs(
        Manifest.load(task.train_manifest), patch_size, recipe.token_budget
    )
    with torch.device("meta"):
        model = Autoencoder(task.model)
    prepare_blocks(model, ParallelConfig(compile=recipe.compile))
    shard_model(model, mesh, getattr(torch, recipe.compute_dtype))
    model.to_empty(device=device)
    _start(model, photographs, recipe)
    crops = Crops(photographs, patch_size, recipe.row_tokens, seed=recipe.seed, rank=rank)
    first_step = time.monotonic()
    progress = _train(model, crops, task, is_first=rank == 0)
    ended = time.monotonic()
    # All of the process so far: below the number of workers, the machine had other things to do.
    processor_s = torch.tensor(time.process_time(), dtype=torch.float64)
    dist.all_reduce(processor_s)

    held_out = evaluation_rows(
        Manifest.load(task.eval_manifest),
        patch_size=patch_size,
        token_budget=recipe.token_budget,
        row_tokens=recipe.row_tokens,
    )
    results, pictures = evaluate_on_all_ranks(model, held_out, device, _NUM_PICTURES)
    if task.picture and rank == 0:
        Image.fromarray(contact_sheet(pictures)).save(task.picture)
    summary = summarize(results)
    return {
        "psnr": summary["eval_psnr"],
        "ssim": summary["eval_ssim"],
        **asdict(progress),
        "tokens_per_s": progress.tokens / (ended - first_step),
        "start_s": first_step - task.started,
        "train_s": ended - task.started,
        "cores_used": float(processor_s) / (ended - task.started),
        "train_images": len(photographs),
        "skipped_images": num_skipped,
        "eval_images": len(results),
    }


@dataclass
class _Progress:
    """What all workers together have done so far; the loss is that of the last step."""

    steps: int = 0
    tokens: int = 0
    squared_error: float = 0.0


def _train(model: Autoencoder, crops: Crops, task: _Task, *, is_first: bool) -> _Progress:
    """Train from the first weights to the end of the time; one step at least."""
    recipe, progress = task.recipe, _Progress()
    optimizer = build_optimizer(model, recipe.optim)
    loop_recipe = Recipe(
        step=squared_error_step,
        flops=lambda row: training_flops(task.model, row.image_tokens),
        initialize=lambda model: None,
    )
    began = reported = time.monotonic()
    while True:
        now = time.monotonic()
        done = (now - began) / max(1e-9, task.deadline - began)
        if task.max_steps:
            done = max(done, progress.steps / task.max_steps)
        done = _of_first_rank(done)
        if done >= 1 and progress.steps:
            return progress
        for group in optimizer.param_groups:
            # The warm-up begins at a rate of 0, with which the first step would be none.
            group["lr"] = learning_rate(recipe.optim, max(done, 1e-3))
        row = crops.row(None if done >= recipe.whole_from else recipe.crop_patches)
        outcome = train_step(
            model,
            optimizer,
            loop_recipe,
            StepRows(step=progress.steps, rows=[row], retries={}),
            recipe.optim.clip_norm,
            torch.device("cpu"),
            leaves=False,
        )
        _, num_images, num_tokens = outcome.values[:3].tolist()
        progress.steps += 1
        progress.tokens += int(num_tokens)
        progress.squared_error = float(outcome.values[-1]) / num_images
        if is_first and not task.quiet and now - reported > _REPORT_S:
            reported = now
            print(
                f"{done:6.1%}  step {progress.steps:5d}  "
                f"squared error {progress.squared_error:.5f}",
                flush=True,
            )


def _of_first_rank(value: float) -> float:
    """Return the first worker's value on all of them: they must agree on the end."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, src=0)
    return float(tensor)


def _start(
    model: Autoencoder, photographs: Sequence[NDArray[np.uint8]], recipe: QualityRecipe
) -> None:
    """Set the first weights; the same photographs on every rank give the same weights."""
    start_at_random(model, recipe.seed)
    start_from_pca(model, sample_patches(photographs, model.config.patch_size))
    if recipe.neighbors:
        attend_to_neighbors(model)


def squared_error_step(model: nn.Module, row: PackedRow, device: torch.device) -> dict[str, Tensor]:
    """Return the squared error of a row, mean over each image's pixels, summed over its images."""
    packed, _ = row.to_packed(device)
    error = model(packed).pixels.tokens.float() - packed.tokens
    return {"loss": sum_of_image_means(error.square().mean(dim=-1), packed)}


def pca_figures(
    train_manifest: Path, eval_manifest: Path, model: AutoencoderConfig, token_budget: int
) -> dict[str, float]:
    """Judge a PCA of the training patches to as many channels as the latent has."""
    photographs, _ = decode_photographs(
        Manifest.load(train_manifest), model.patch_size, token_budget
    )
    mean, _, basis = principal_components(sample_patches(photographs, model.patch_size))
    kept = basis[:, : model.latent_channels]

    def reconstruct(packed: PackedTokens) -> Reconstruction:
        codes = (packed.tokens.double() - mean) @ kept
        pixels = packed.with_tokens((codes @ kept.T + mean).float())
        return Reconstruction(pixels=pixels, latents=packed.with_tokens(codes.float()), kl_T=None)

    rows = evaluation_rows(
        Manifest.load(eval_manifest),
        patch_size=model.patch_size,
        token_budget=token_budget,
        row_tokens=4096,
    )
    summary = summarize(evaluate_rows(reconstruct, rows, torch.device("cpu"), 0)[0])
    return {"pca_psnr": summary["eval_psnr"], "pca_ssim": summary["eval_ssim"]}
