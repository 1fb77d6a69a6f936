"""`vitok sample`, `generate`, `curves` and `joint`: what generators make, and how they compare."""

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from jobs import positional
from pipelines.generation.flow_curves import Curve, best_for_compute, curve_of, draw_curves
from pipelines.generation.generate import (
    Generation,
    Generator,
    generate,
    prepare_generation,
)
from pipelines.generation.joint import (
    CURVES,
    JointScaling,
    draw_study,
    prepare_study,
    run_study,
)
from pipelines.generation.sampling import (
    Request,
    embed_texts,
    load_text_encoder,
    require_texts_learned,
    spread_classes,
    whole_patches,
)
from pipelines.reconstruction import sheet_of
from pipelines.train_flow import read_statistics
from vitok.flow import Method, SamplerConfig
from vitok.storage import Folder


def sample(
    run: positional.Run,
    /,
    *,
    label: Annotated[tuple[int, ...], tyro.conf.arg(name="class")] = (),
    text: tuple[str, ...] = (),
    seed: int = 0,
    count: int = 8,
    size: str = "256x256",
    steps: int = 50,
    method: Method = "euler",
    guidance: float = 4.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    autoencoder: str = "",
    text_encoder: str = "",
    dtype: str = "float32",
    out: str = "samples.png",
) -> None:
    """Sample images of a flow model, and save them as one sheet.

    Args:
        run: folder of a flow training, such as runs/NAME; its newest checkpoint is taken.
        label: classes, each sampled `count` times in a row of seeds; none spreads `count` images
            over all classes.
        text: captions, each sampled `count` times likewise, of each class if some are given; for a
            model that learned texts.
        seed: of the first image of each class and text; the same seed, class, text and size give
            the same image.
        count: how many images.
        size: HEIGHTxWIDTH in pixels, of any aspect ratio, enlarged to whole patches.
        steps: from noise to data.
        method: of integration.
        guidance: how far beyond the null condition's velocity; 1 is that of class or text alone.
        guidance_interval: times from and to which it is guided, from 0 (noise) to 1 (data).
        autoencoder: whose decoder makes pixels; the run's own if empty.
        text_encoder: of the texts; where it was when the run's cache was made, if empty.
        dtype: precision of the weights: float32 or bfloat16.
        out: the PNG file.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    sampler = SamplerConfig(
        steps=steps, method=method, guidance=guidance, guidance_interval=guidance_interval
    )
    folder = Folder.of(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = Generator.load(folder, autoencoder, device, getattr(torch, dtype))
    model, statistics = generator.training.model, read_statistics(folder)
    if label and not model.num_classes:
        raise ValueError("the model learned no classes; leave --class out")
    if wrong := [one for one in label if not -1 <= one < model.num_classes]:
        raise ValueError(f"class {wrong[0]} is none of the run's: 0 to {model.num_classes - 1}")
    embedded: list[torch.Tensor | None] = [None]
    if text:
        require_texts_learned(model, "--text")
        encoder = load_text_encoder(statistics, text_encoder, device)
        embedded = [*embed_texts(text, statistics, encoder)]
    pixels = whole_patches(parse_size(size), statistics.patch_size)
    if label or text:
        pairs = [pair for pair in product(label or [-1], embedded) for _ in range(count)]
    else:
        pairs = [(one, None) for one in spread_classes(count, model.num_classes)]
    requests = [
        Request(seed + i % count, one, pixels, caption) for i, (one, caption) in enumerate(pairs)
    ]
    start = time.perf_counter()
    images = generator.images(requests, sampler, generator.training.row_tokens)
    seconds = time.perf_counter() - start
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet_of(images)).save(out)
    print(f"{len(images)} images of {pixels[0]} x {pixels[1]} pixels in {seconds:.1f} s: {out}")


def generate_set(settings: Generation) -> None:
    """Sample many images as WebDataset shards on a Ray cluster; goes on where it was stopped."""
    from cluster.local import ray_session

    settings = prepare_generation(settings)
    with ray_session():
        shards = generate(settings)
    print(f"{settings.num_images} images in {len(shards)} shards: {Folder.of(settings.out).uri}")


def curves(
    runs: positional.Runs,
    /,
    *,
    metric: str = "loss",
    smooth: int = 20,
    out: str = "curves.png",
) -> None:
    """Draw a metric of flow trainings against the operations they took.

    Args:
        runs: folders of flow trainings, such as those of a study of `vitok joint`.
        metric: that the runs recorded; lower is better.
        smooth: means over so many neighbouring records.
        out: the PNG file.
    """
    if smooth < 1:
        raise ValueError(f"smooth={smooth} must be at least 1")
    found = [curve_of(Folder.of(run), metric, smooth) for run in runs]
    if not found:
        raise ValueError("there are no runs; give the folders of flow trainings")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_bytes(draw_curves(found, metric))
    print(f"{describe_curves(found, metric)}\ncurves: {out}")


def describe_curves(found: Sequence[Curve], metric: str) -> str:
    """Return where curves end, and the best of all."""
    width = max(len(curve.name) for curve in found)
    lines = [
        f"{curve.name:<{width}}  {curve.flops[-1]:.3g} operations  {curve.values[-1]:.4g}"
        for curve in found
    ]
    flops, value, name = best_for_compute(found)[-1]
    return "\n".join([*lines, f"best {metric}: {value:.4g} of {name} after {flops:.3g} operations"])


def run_joint(study: JointScaling) -> None:
    """Run a joint-scaling study on a Ray cluster; goes on where it was stopped."""
    from cluster.local import ray_session

    study = prepare_study(study)
    total = len(study.autoencoders) * len(study.generators)
    with ray_session():
        for number, training in enumerate(run_study(study), start=1):
            print(f"{number}/{total}  {training.run.name}", flush=True)
    print(describe_curves(draw_study(study), study.metric))
    print(f"curves: {study.folder.uri}/{CURVES}")


def parse_size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH.

    Raises:
        ValueError: it has another form, or a side is 0.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()) or 0 in (int(height), int(width)):
        raise ValueError(f"size={text!r} must be HEIGHTxWIDTH in pixels, as in 256x384")
    return int(height), int(width)
