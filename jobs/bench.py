"""Benchmarks: JSON on the last line of stdout."""

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from json import dumps
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from jobs import positional

if TYPE_CHECKING:
    from jobs.bench_train import StepFigures


def attention(
    row_tokens: int = 4096,
    tokens_per_image: int = 240,
    num_heads: int = 12,
    head_dim: int = 64,
    threads: int = 2,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Forward and backward of packed attention, bf16, against the other ways to compute it.

    Args:
        row_tokens: tokens of the packed row.
        tokens_per_image: most tokens of an image in it; the least are three quarters of that.
        num_heads: attention heads.
        head_dim: channels of a head.
        threads: CPU threads.
        repeats: timed passes; the median counts.
        json: print the JSON alone.
    """
    from jobs.bench_attention import measure_attention

    torch.set_num_threads(threads)
    figures = measure_attention(
        row_tokens=row_tokens,
        tokens_per_image=tokens_per_image,
        num_heads=num_heads,
        head_dim=head_dim,
        repeats=repeats,
    )
    _finish("attention", _rounded(dict(figures), quiet=json), threads)


def inference(
    model: str = "Bd4-B/16x64",
    windows: tuple[int | Literal["full"], ...] = (8, "full"),
    resolutions: tuple[int, ...] = (256, 512, 1024, 2048, 4096),
    baselines: tuple[str, ...] = (),
    image: str = "",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    threads: int = 2,
    repeats: int = 5,
    limit_s: float = 120.0,
    limit_gb: float | None = None,
    json: bool = False,
) -> None:
    """Time, memory and PSNR of reconstruction over resolutions, full and window attention.

    Args:
        model: a name, such as Ld4-L/16x64, for random blocks around a PCA of the photograph, or the
            location of trained weights.
        windows: radii in patches of sliding-window attention, or full.
        resolutions: pixels of each side.
        baselines: sd-vae, flux, dc-ae: their shapes with random weights (extra `baselines`).
        image: photograph to reconstruct; one that scikit-learn carries if empty.
        dtype: precision of the weights.
        threads: CPU threads.
        repeats: timed passes, fewer where they take long; the median counts.
        limit_s: a case expected to take longer is left out, and says so.
        limit_gb: likewise for memory; by default what is available.
        json: print the JSON alone.
    """
    from jobs.bench_inference import Case, measure_inference, report

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def show(case: Case) -> None:
        if json:
            return
        figures = case.skipped
        if not figures:
            quality = "" if case.psnr is None else f"  {case.psnr:6.2f} dB"
            figures = f"{case.seconds:8.2f} s  {case.peak_mb:8.0f} MB{quality}"
        window = f"window {case.window}" if case.window else ""
        print(f"{case.subject:<14} {window:<11} {case.resolution:>5}p  {figures}", flush=True)

    cases = measure_inference(
        model=model,
        windows=windows,
        resolutions=resolutions,
        baselines=baselines,
        image=image,
        dtype=getattr(torch, dtype),
        device=device,
        repeats=repeats,
        limit_s=limit_s,
        limit_gb=_free_bytes() / 2**30 if limit_gb is None else limit_gb,
        show=show,
    )
    _finish("inference", {"model": model, "dtype": dtype, **report(cases)}, threads)


def ingest(
    shards: tuple[str, ...] = (),
    token_budgets: tuple[int, ...] = (256,),
    packed_budgets: tuple[int, ...] = (64, 128, 256, 512, 1024),
    packed_images: int = 8192,
    images_per_step: int = 256,
    row_tokens: int = 8192,
    num_images: int = 0,
    ray_images: int = 8192,
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Images/s from bare decoding to packed rows in one process, and through Ray; utilisation.

    Args:
        shards: WebDataset shards: files, folders, globs or URIs; those that the environment
            variable VITOK_SAMPLE names if empty, else the corpus of the quickstart.
        token_budgets: token budgets of the crops that are decoded.
        packed_budgets: token budgets of the training stream whose utilisation is planned.
        packed_images: images of a step of that stream.
        images_per_step: images that are decoded and packed together.
        row_tokens: tokens of a packed row.
        num_images: images of a pass in one process; one epoch if 0.
        ray_images: images through Ray, on all cores; 0 leaves Ray out.
        repeats: timed passes in one process, on one thread; the median counts.
        json: print the JSON alone.
    """
    from jobs.bench_ingest import measure_ingest

    torch.set_num_threads(1)
    figures = measure_ingest(
        shards=shards,
        token_budgets=token_budgets,
        packed_budgets=packed_budgets,
        packed_images=packed_images,
        images_per_step=images_per_step,
        row_tokens=row_tokens,
        num_images=num_images,
        ray_images=ray_images,
        repeats=repeats,
    )
    _finish("ingest", _rounded(dict(figures), quiet=json), threads=1)


def train(
    model: str = "Bd4-B/16x64",
    token_budget: int = 256,
    row_tokens: int = 4096,
    rows_per_step: int = 1,
    ssim: float = 0.1,
    dino_weights: str = "",
    steps: int = 7,
    compile: tuple[bool, ...] = (False, True),
    checkpoint_every: int = 0,
    float8: bool = False,
    ray_steps: int = 12,
    shards: tuple[str, ...] = (),
    threads: int = os.cpu_count() or 1,
    json: bool = False,
) -> None:
    """The training step of one worker on rows in memory, part by part, and through Ray.

    Args:
        model: a name, such as Ld4-L/16x64; random weights.
        token_budget: most tokens of an image.
        row_tokens: tokens of a packed row.
        rows_per_step: rows that are accumulated in a step.
        ssim: weight of the SSIM term; 0 leaves it out.
        dino_weights: DINOv3 for the perceptual term, with the weight of the paper; none if empty.
        steps: on rows in memory, two of which warm up.
        compile: whether blocks are compiled; both ways are measured.
        checkpoint_every: every n-th block recomputes its activations.
        float8: compute the blocks in float8; needs compute capability 8.9.
        ray_steps: steps through Ray, the faster way of the two; 0 leaves Ray out.
        shards: as for the benchmark ingest.
        threads: CPU threads.
        json: print the JSON alone.
    """
    from jobs.bench_train import measure_training
    from vitok.losses import LossConfig
    from vitok.parallel import ParallelConfig

    torch.set_num_threads(threads)

    loss = LossConfig.paper(dino_weights) if dino_weights else LossConfig()
    figures = measure_training(
        model=model,
        token_budget=token_budget,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        loss=replace(loss, ssim=ssim),
        steps=steps,
        parallels={
            "compiled" if compiled else "eager": ParallelConfig(
                compile=compiled, checkpoint_every=checkpoint_every, float8=float8
            )
            for compiled in compile
        },
        ray_steps=ray_steps,
        shards=shards,
        threads=threads,
        show=_show_nothing if json else _show_step,
    )
    rounded = _rounded(figures, quiet=json)
    _finish("train", {"model": model, "row_tokens": row_tokens, **rounded}, threads)


def flow(
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    autoencoder: str = "Ld4-B/16x64",
    token_budget: int = 256,
    row_tokens: int = 4096,
    rows_per_step: int = 1,
    steps: int = 7,
    ray_steps: int = 12,
    compile: bool = True,
    float8: bool = False,
    shards: tuple[str, ...] = (),
    threads: int = os.cpu_count() or 1,
    json: bool = False,
) -> None:
    """Flow training on cached latents through Ray and in memory, and what the cache saves.

    Args:
        width: channels of the generator.
        depth: its blocks.
        heads: its attention heads.
        autoencoder: whose latents these are, a name; random weights.
        token_budget: most tokens of an image.
        row_tokens: tokens of a packed row.
        rows_per_step: rows that are accumulated in a step.
        steps: on rows in memory, two of which warm up.
        ray_steps: steps through Ray.
        compile: compile the blocks.
        float8: compute the blocks in float8; needs compute capability 8.9.
        shards: as for the benchmark ingest.
        threads: CPU threads.
        json: print the JSON alone.
    """
    from jobs.bench_flow import measure_flow
    from vitok.dit import DiTConfig
    from vitok.parallel import ParallelConfig
    from vitok.variants import AutoencoderConfig

    torch.set_num_threads(threads)

    figures = measure_flow(
        model=DiTConfig(
            latent_channels=AutoencoderConfig.from_name(autoencoder).latent_channels,
            width=width,
            depth=depth,
            heads=heads,
            num_classes=1000,
        ),
        autoencoder=autoencoder,
        token_budget=token_budget,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        steps=steps,
        ray_steps=ray_steps,
        parallel=ParallelConfig(compile=compile, float8=float8),
        shards=shards,
        threads=threads,
        show=_show_nothing if json else _show_step,
    )
    rounded = _rounded(figures, quiet=json)
    shape = {"width": width, "depth": depth, "autoencoder": autoencoder, "row_tokens": row_tokens}
    _finish("flow", {**shape, **rounded}, threads)


def quality(
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
    from jobs.bench_quality import measure_quality, ten_minutes_on_two_cores
    from vitok.variants import AutoencoderConfig

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
    _finish("quality", {"minutes": minutes, **rounded}, threads=workers)


def encode(
    model: str = "Bd4-B/16x64",
    side: int = 256,
    shards: tuple[str, ...] = (),
    copies: int = 2,
    unit_samples: int = 128,
    row_tokens: int = 4096,
    threads: int = 2,
    cpus_per_reader: float = 0.5,
    json: bool = False,
) -> None:
    """Encoding into a latent cache through Ray, against the bare encoder and a plain loop.

    Args:
        model: architecture, with random weights; with linear-B/16x64 decoding is what takes time.
        side: pixels of the squares that are encoded.
        shards: WebDataset shards: files, folders, globs or URIs; if empty those that the
            environment variable VITOK_SAMPLE names, else the quickstart's corpus.
        copies: every image is there so often, under other keys.
        unit_samples: images of a unit.
        row_tokens: tokens of a packed row.
        threads: CPU threads of the encoder.
        cpus_per_reader: logical cores of each task that decodes; there are as many of them as the
            machine has cores.
        json: print the JSON alone.
    """
    from jobs.bench_encode import measure_encoding

    figures = measure_encoding(
        shards=shards,
        copies=copies,
        model=model,
        side=side,
        unit_samples=unit_samples,
        row_tokens=row_tokens,
        threads=threads,
        cpus_per_reader=cpus_per_reader,
    )
    rounded = _rounded(dict(figures), quiet=json)
    _finish("encode", {"model": model, "side": side, **rounded}, threads)


def evaluate(
    model: str = "Bd4-B/16x64",
    side: int = 256,
    dino: str = "",
    shards: tuple[str, ...] = (),
    num_images: int = 128,
    row_tokens: int = 8192,
    features: int = 2048,
    threads: int = 2,
    repeats: int = 3,
    json: bool = False,
) -> None:
    """A worker of an evaluation (PSNR, SSIM, Fréchet features), its parts, and a Fréchet distance.

    Args:
        model: architecture, with random weights.
        side: pixels of the squares that are evaluated.
        dino: DINOv3 that describes the reconstructions; random weights of the size S/16 if empty.
        shards: WebDataset shards: files, folders, globs or URIs; if empty those that the
            environment variable VITOK_SAMPLE names, else the quickstart's corpus.
        num_images: the first ones of them.
        row_tokens: patches of 16 pixels of one pass.
        features: numbers of an image in the distance that is timed; Inception-v3 has 2,048.
        threads: CPU threads; one more reads ahead.
        repeats: timed passes of everything; the medians count.
        json: print the JSON alone.
    """
    from jobs.bench_evaluate import measure_evaluation

    figures = measure_evaluation(
        shards=shards,
        model=model,
        dino=dino,
        side=side,
        num_images=num_images,
        row_tokens=row_tokens,
        num_features=features,
        threads=threads,
        repeats=repeats,
    )
    rounded = _rounded(dict(figures), quiet=json)
    _finish("evaluate", {"model": model, "side": side, **rounded}, threads)


def every(labels: positional.Names = (), /, *, json: bool = False) -> None:
    """Every benchmark with its defaults, one after the other, beside what the project aims at.

    Takes most of an hour on two cores, and means something only where nothing else runs.

    Args:
        labels: some of them alone: attention, ingest, encode, encode-linear, train, flow,
            inference, evaluate, quality.
        json: print the JSON alone.
    """
    from jobs.bench_all import run_all

    def show(line: str) -> None:
        if not json:
            print(line, flush=True)

    _finish("all", run_all(labels, show), threads=os.cpu_count() or 1)


BENCHMARKS: dict[str, Callable[..., None]] = {
    "attention": attention,
    "inference": inference,
    "ingest": ingest,
    "encode": encode,
    "evaluate": evaluate,
    "train": train,
    "flow": flow,
    "quality": quality,
    "all": every,
}


def _free_bytes() -> int:
    """Return the memory that models may still take: of the GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _show_step(name: str, figures: "StepFigures") -> None:
    print(
        f"{name:<12} {figures.seconds:8.3f} s/step {figures.tokens_per_s:10.0f} tokens/s "
        f"{figures.mfu:6.1%} of {figures.peak_flops / 1e12:.3g} TFLOP/s",
        flush=True,
    )


def _show_nothing(name: str, figures: "StepFigures") -> None:
    pass


def _rounded(figures: dict[str, float | str], *, quiet: bool) -> dict[str, float | str]:
    """Return figures with four decimals, after a line for each."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    if not quiet:
        for name, figure in rounded.items():
            print(f"{name:<30} {figure}")
    return rounded


def _finish(name: str, figures: dict[str, Any], threads: int) -> None:
    cuda = torch.cuda.is_available()
    device = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
    }
    print(dumps({"benchmark": name, **figures, **device}))
