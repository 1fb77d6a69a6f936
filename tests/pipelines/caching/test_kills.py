"""An encoding that is killed again and again ends with the files of one that never was."""

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import cache_latents as module
from pipelines.cache_latents import cache_latents
from pipelines.caching.config import LatentCaching
from pipelines.caching.verify import verify_here
from pipelines.latents import LatentCache
from tests.pipelines.encoding_process import differing, encode_all, files_of, small_caching

KILLS = 20
JOIN_TIMEOUT_S = 120.0


@pytest.fixture
def caching(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> LatentCaching:
    return small_caching(
        sample_manifests[0],
        tiny_weights,
        tmp_path / "undisturbed",
        token_budgets=(36,),
        squares=(48,),
        flip=True,
        unit_samples=2,
        num_workers=4,
    )


def committed(cache: str) -> dict[str, int]:
    """When the files of each committed unit were written."""
    return {
        file.name: file.stat().st_mtime_ns
        for book in Path(cache, "units").glob("*.json")
        for file in (book, book.with_suffix(".safetensors"))
    }


def test_twenty_kills_change_no_byte_and_nothing_is_encoded_twice(
    caching: LatentCaching, tmp_path: Path
) -> None:
    # Its children are copies of a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipelines.encoding_process"])

    def start(settings: LatentCaching) -> Any:
        process = context.Process(target=encode_all, args=(settings,))
        process.start()
        return process

    began = time.monotonic()
    process = start(caching)
    process.join(JOIN_TIMEOUT_S)
    assert process.exitcode == 0
    assert len(files_of(caching.out)) == 3 + 2 * 30

    killed = replace(caching, out=str(tmp_path / "killed"))
    generator = random.Random(0)
    seen: dict[str, int] = {}
    num_kills = 0
    while not (tmp_path / "killed.done").exists():
        process = start(killed)
        # Up to two units further than before, and there at any moment of the next one.
        target = len(seen) + generator.randrange(3)
        while process.is_alive() and len(committed(killed.out)) < target:
            time.sleep(0.001)
        if num_kills < KILLS:
            time.sleep(generator.uniform(0, 0.03))
            num_kills += process.is_alive()
            process.kill()
        process.join(JOIN_TIMEOUT_S)
        assert process.exitcode in (0, -signal.SIGKILL)
        now = committed(killed.out)
        assert {name: now[name] for name in seen} == seen, "committed units are left alone"
        seen = now
        assert time.monotonic() - began < JOIN_TIMEOUT_S
    # On a busy machine it gets further between two looks at it, and is done before the last kill.
    assert num_kills >= KILLS // 2
    assert differing(killed.out, caching.out) == []
    assert verify_here(killed.out).bad == []


DEATHS = {(1, "prepare"), (4, "committed"), (6, "encode")}


def deadly(folder: Path) -> tuple[type, type]:
    """Return what runs in the workers, made to kill its process at each of DEATHS, once each.

    Args:
        folder: gets a file for each death.
    """

    def die(batch: dict[str, Any], moment: str) -> None:
        unit = int(batch["unit"][0])
        if (unit, moment) in DEATHS:
            try:
                (folder / f"{unit} {moment}").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    class DeadlySteps(module._Steps):
        def prepare(self, batch: dict[str, Any]) -> Any:
            for record in super().prepare(batch):
                die(record, "prepare")
                yield record

        def commit(self, batch: dict[str, Any]) -> Any:
            committed = super().commit(batch)
            die(batch, "committed")
            return committed

    class DeadlyEncoder(module._EncoderActor):
        def __call__(self, batch: dict[str, Any]) -> Any:
            encoded = super().__call__(batch)
            die(batch, "encode")
            return encoded

    return DeadlySteps, DeadlyEncoder


def test_four_encoders_and_dying_workers_give_the_files_of_one_process(
    ray_cluster: None, caching: LatentCaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caching = replace(caching, unit_samples=7)
    one = replace(caching, out=str(tmp_path / "one"))
    process = multiprocessing.get_context("forkserver").Process(target=encode_all, args=(one,))
    process.start()
    steps, encoder = deadly(tmp_path)
    monkeypatch.setattr(module, "_Steps", steps)
    monkeypatch.setattr(module, "_EncoderActor", encoder)
    cache_latents(caching)
    process.join(JOIN_TIMEOUT_S)
    assert process.exitcode == 0
    assert len(list(tmp_path.glob("[0-9] *"))) == len(DEATHS), "all of them died"
    assert differing(caching.out, one.out) == []
    assert len(LatentCache(caching.out)) == 60 * 4
