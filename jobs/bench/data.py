"""The photographs that benchmarks work on."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.sample_corpus import make_sample_corpus
from pipelines.corpus import Manifest, build_manifest

SAMPLE_VARIABLE = "VITOK_SAMPLE"


@contextmanager
def indexed_shards(shards: Sequence[str]) -> Iterator[Manifest]:
    """Index the shards, those of the environment variable, or those of the quickstart."""
    shards = shards or [os.environ[SAMPLE_VARIABLE]] if SAMPLE_VARIABLE in os.environ else shards
    with tempfile.TemporaryDirectory(prefix="vitok-bench-") as folder:
        if shards:
            manifest = build_manifest(shards, Path(folder) / "manifest")
        else:
            manifest = Manifest.load(make_sample_corpus(Path(folder) / "corpus")[0])
        yield manifest
