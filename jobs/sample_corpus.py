"""The corpus of the quickstart: crops of the photographs that two Python packages carry.

It needs no network and no data set, and stands in for a real corpus only in shape: many sizes and
aspect ratios, colour and gray, WebDataset shards with labels, an evaluation set from photographs
that training never sees.
"""

import importlib.util
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines.corpus import index_shard, write_manifest, write_shards

# (package, file inside it). The label of a crop is the position of its photograph, training first.
TRAIN_PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/grass.png"),
)
EVAL_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/coffee.png"),
)
SAMPLES_PER_SHARD = 64
MIN_SIDE, MAX_SIDE = 96, 512
MAX_ASPECT = 3.0

_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def make_sample_corpus(
    folder: Path, *, num_train: int = 320, num_eval: int = 16, seed: int = 0
) -> tuple[Path, Path]:
    """Write the sample corpus into a folder and return its two manifests, (train, eval).

    The same arguments give the same images. A folder that holds the corpus of these arguments
    already is used as it is.

    Raises:
        FileExistsError: the folder holds something else.
        ModuleNotFoundError: a package with the photographs is not installed.
    """
    folder = Path(folder).absolute()
    recipe = {"num_train": num_train, "num_eval": num_eval, "seed": seed}
    manifests = folder / "train", folder / "eval"
    if folder.exists() and any(folder.iterdir()):
        if not _holds(folder, recipe):
            raise FileExistsError(
                f"{folder}: holds something else than the sample corpus of {recipe}; "
                "remove it or choose another folder"
            )
        return manifests
    train_rng, eval_rng = np.random.default_rng(seed).spawn(2)
    num_classes = len(TRAIN_PHOTOGRAPHS)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, samples in (
        ("train", _crops(TRAIN_PHOTOGRAPHS, num_train, train_rng)),
        ("eval", _crops(EVAL_PHOTOGRAPHS, num_eval, eval_rng, first_label=num_classes)),
    ):
        shards = write_shards(samples, unfinished / "shards", split, SAMPLES_PER_SHARD)
        # The manifest speaks of the shards where they will lie.
        indexes = (
            replace(index_shard(shard), uri=str(folder / "shards" / Path(shard).name))
            for shard in shards
        )
        write_manifest(indexes, unfinished / split)
    (unfinished / "corpus.json").write_text(json.dumps(recipe) + "\n")
    os.replace(unfinished, folder)
    return manifests


def photograph_path(package: str, name: str) -> Path:
    """Where an installed package keeps a photograph; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the sample corpus needs photographs from {_DISTRIBUTIONS[package]}; "
            f"`pip install {_DISTRIBUTIONS[package]}` brings them"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: this photograph is missing; "
            f"`pip install --force-reinstall {_DISTRIBUTIONS[package]}` brings it back"
        )
    return path


def _holds(folder: Path, recipe: dict[str, int]) -> bool:
    note = folder / "corpus.json"
    return note.is_file() and json.loads(note.read_text()) == recipe


def _crops(
    photographs: tuple[tuple[str, str], ...],
    num_crops: int,
    rng: np.random.Generator,
    first_label: int = 0,
) -> Iterator[dict]:
    """Samples for write_shards: crops that take turns among the photographs, in random order."""
    opened = []
    for package, name in photographs:
        with Image.open(photograph_path(package, name)) as photograph:
            opened.append((Path(name).stem, photograph.copy()))
    order = rng.permutation(num_crops) % len(photographs)
    for index, photograph_index in enumerate(tqdm(order, desc="corpus", unit="image")):
        name, photograph = opened[photograph_index]
        height, width = _crop_size(photograph.height, photograph.width, rng)
        top = int(rng.integers(photograph.height - height + 1))
        left = int(rng.integers(photograph.width - width + 1))
        flipped = bool(rng.integers(2))
        crop = photograph.crop((left, top, left + width, top + height))
        if flipped:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        encoded = io.BytesIO()
        crop.save(encoded, format="JPEG", quality=int(rng.integers(90, 96)))
        yield {
            "__key__": f"{index:06d}-{name}",
            "jpg": encoded.getvalue(),
            "cls": first_label + int(photograph_index),
            "json": {"photograph": name, "top": top, "left": left, "flipped": flipped},
        }


def _crop_size(photo_height: int, photo_width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (height, width): log-uniform in size and in aspect ratio, within the photograph."""
    mean_side = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE)))
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(MAX_ASPECT))
    height, width = mean_side * stretch, mean_side / stretch
    shrink = min(
        1.0,
        min(MAX_SIDE, photo_height) / height,
        min(MAX_SIDE, photo_width) / width,
    )
    # Raising a side to the least one brings the two nearer to each other, never past the aspect.
    return max(MIN_SIDE, int(height * shrink)), max(MIN_SIDE, int(width * shrink))
