import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from jobs.cli import main
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.generation import generate as generate_module
from pipelines.generation.generate import (
    Generation,
    Generator,
    _prompts,
    _SampleUnits,
    generate,
    prepare_generation,
    shard_name,
    unit_requests,
)
from pipelines.generation.sampling import Request, sample_requests, spread_classes, whole_patches
from pipelines.runs import latest_checkpoint
from pipelines.train_autoencoder import prepare as prepare_autoencoder
from pipelines.train_flow import FlowTraining, corpus_of, prepare, read_statistics, shown_requests
from tests.pipelines.flow_runs import SMALL_SET, flow_training, write_checkpoint
from tests.pipelines.small_caches import CHANNELS
from vitok.flow import SamplerConfig
from vitok.storage import Folder

SAMPLER = SamplerConfig(steps=3, guidance=2.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this small, threads are a cost."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FlowTraining:
    """A flow training with a checkpoint, and the autoencoder of its latents; nobody trained it."""
    folder = tmp_path_factory.mktemp("flow")
    settings = prepare(flow_training(folder))
    write_checkpoint(settings)
    assert latest_checkpoint(settings.run.folder) is not None
    return settings


@pytest.fixture
def generation(finished_run: FlowTraining, tmp_path: Path) -> Generation:
    return Generation(
        model=finished_run.run.folder.uri,
        out=str(tmp_path / "samples"),
        num_images=11,
        size=(40, 64),
        sampler=SAMPLER,
        **SMALL_SET,
    )


def generator_of(settings: FlowTraining) -> Generator:
    return Generator.load(settings.run.folder, "", torch.device("cpu"), torch.float32)


def test_an_image_depends_on_its_request_and_not_on_the_others(finished_run) -> None:
    generator = generator_of(finished_run)
    requests = [Request(5, 2, (32, 48)), Request(6, -1, (48, 48)), Request(5, 2, (16, 64))]
    statistics = read_statistics(finished_run.run.folder)

    def latents(requests: list[Request], row_tokens: int) -> list[torch.Tensor]:
        found = sample_requests(
            generator.model,
            requests,
            statistics,
            torch.device("cpu"),
            sampler=SAMPLER,
            times=finished_run.times,
            row_tokens=row_tokens,
        )
        assert [latent.image_size for latent in found] == [r.size for r in requests]
        return [latent.tokens for latent in found]

    together = latents(requests, 64)
    assert [len(tokens) for tokens in together] == [6, 9, 4]
    for tokens, again in zip(together, latents(requests, 9), strict=True):
        torch.testing.assert_close(tokens, again, rtol=1e-4, atol=1e-4)
    for request, tokens in zip(requests, together, strict=True):
        (alone,) = latents([request], 64)
        torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-4)
        (other,) = latents([replace(request, seed=request.seed + 1)], 64)
        assert not torch.allclose(tokens, other, atol=0.1)
    assert all(torch.equal(*pair) for pair in zip(together, latents(requests, 64), strict=True))


def test_images_have_the_size_that_was_asked_for(finished_run) -> None:
    images = generator_of(finished_run).images(
        [Request(0, 1, (32, 80)), Request(1, 1, (64, 16))], SAMPLER, row_tokens=64
    )
    assert [image.shape for image in images] == [(32, 80, 3), (64, 16, 3)]
    assert all(image.dtype == np.uint8 and image.std() > 0 for image in images)


def test_shown_samples_spread_over_the_classes_with_seeds_of_their_own(finished_run) -> None:
    requests = shown_requests(finished_run, corpus_of(finished_run))
    assert [(r.seed, r.label, r.size) for r in requests] == [
        (0, 0, (32, 48)),
        (1, 2, (32, 48)),
        (2, 4, (32, 48)),
    ]
    assert spread_classes(4, 2) == [0, 0, 1, 1]
    assert spread_classes(2, 0) == [-1, -1]
    assert whole_patches((1, 33), 16) == (16, 48)


def test_every_sample_of_a_set_has_its_own_seed_and_every_class_its_turn(generation) -> None:
    prompts = _prompts(generation, torch.device("cpu"))
    requests = [
        request for unit in range(3) for request in unit_requests(generation, unit, prompts)
    ]
    assert [request.seed for request in requests] == list(range(100, 111))
    assert [request.label for request in requests] == [i % 6 for i in range(11)]
    assert {request.size for request in requests} == {(48, 64)}


def test_shard_depends_on_its_number_alone(generation: Generation) -> None:
    advanced: list[int] = []
    board = SimpleNamespace(advance=SimpleNamespace(remote=advanced.append))
    sample_units = _SampleUnits(generation, board)
    sample_units({"unit": np.array([0, 1, 2])})
    assert advanced == [4, 4, 3]
    paths = sorted(Path(generation.out).glob("*.tar"))
    assert [path.name for path in paths] == [shard_name(unit) for unit in range(3)]
    first = [path.read_bytes() for path in paths]
    for unit in (2, 0, 1):
        paths[unit].unlink()
        # Another worker, in another order.
        _SampleUnits(generation, board)({"unit": np.array([unit])})
    assert [path.read_bytes() for path in paths] == first


def test_set_is_the_same_for_any_number_of_workers_and_after_a_stop(
    ray_cluster: None,
    finished_run: FlowTraining,
    generation: Generation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = replace(generation, out=str(tmp_path / "alone"))
    board = SimpleNamespace(advance=SimpleNamespace(remote=lambda count: None))
    _SampleUnits(alone, board)({"unit": np.array([0, 1, 2])})
    expected = [path.read_bytes() for path in sorted((tmp_path / "alone").glob("*.tar"))]
    # What is there is kept, what is missing is made, by two workers.
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / shard_name(1)).write_bytes(expected[1])
    kept = (folder / shard_name(1)).stat().st_mtime_ns
    settings = prepare_generation(generation)
    shards = generate(settings)
    assert [Path(shard).name for shard in shards] == [shard_name(unit) for unit in range(3)]
    assert [Path(shard).read_bytes() for shard in shards] == expected
    assert (folder / shard_name(1)).stat().st_mtime_ns == kept

    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [int(sample["cls"]) for sample in samples] == [i % 6 for i in range(11)]
    assert [json.loads(sample["json"])["seed"] for sample in samples] == list(range(100, 111))
    pictures = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
    assert all(picture.shape == (48, 64, 3) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 11

    with monkeypatch.context() as patched:
        patched.setattr(generate_module, "_SampleUnits", None)  # would fail if it were started
        assert generate(settings) == shards
    other = replace(generation, sampler=replace(SAMPLER, guidance=3.0))
    with pytest.raises(ValueError, match=r"holds other samples \(sampler.guidance: 2.0 -> 3.0\)"):
        prepare_generation(other)


def test_sample_writes_a_sheet_of_images_of_any_aspect(
    finished_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sheet(*arguments: str) -> np.ndarray[Any, Any]:
        out = tmp_path / "sheet.png"
        run = finished_run.run.folder.uri
        options = ["--steps", "2", "--guidance", "1.5", "--out", str(out)]
        assert main(["sample", run, *options, *arguments]) == 0
        return np.asarray(Image.open(out))

    first = sheet("--class", "1", "3", "--count", "2", "--size", "32x96")
    assert "4 images of 32 x 96 pixels" in capsys.readouterr().out
    assert np.array_equal(first, sheet("--class", "1", "3", "--count", "2", "--size", "32x96"))
    other = sheet("--class", "1", "3", "--count", "2", "--size", "32x96", "--seed", "9")
    assert first.shape == other.shape and not np.array_equal(first, other)
    sheet("--count", "3")
    assert "3 images of 256 x 256 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--class", "6"], "class 6 is none of the run's: 0 to 5"),
        (["--size", "32"], "size='32' must be HEIGHTxWIDTH in pixels"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--count", "0"], "count=0 must be at least 1"),
    ],
)
def test_wrong_arguments_of_sample_are_named(
    finished_run, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", finished_run.run.folder.uri, *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_folder_without_a_run_or_a_checkpoint_is_named(
    finished_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tmp_path)]) == 1
    assert "holds no run (no config.json)" in capsys.readouterr().err
    settings = prepare(replace(finished_run, run=replace(finished_run.run, storage=str(tmp_path))))
    assert main(["sample", settings.run.folder.uri]) == 1
    assert "has no complete checkpoint yet" in capsys.readouterr().err


def test_run_of_another_kind_is_named_with_the_command_that_makes_the_right_one(
    finished_run: FlowTraining,
    tiny_training: AutoencoderTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = finished_run.run.folder
    autoencoder = prepare_autoencoder(tiny_training).run.folder
    sentence = "is the run of an autoencoder (`vitok train`); give the run of a generator (`vitok"
    for command in (
        ["sample", autoencoder.uri],
        ["generate", "--model", autoencoder.uri, "--out", str(tmp_path / "out")],
        ["curves", autoencoder.uri],
    ):
        assert main(command) == 1
        assert f"{autoencoder.uri} {sentence}" in capsys.readouterr().err
    sentence = "is the run of a generator (`vitok flow`); give the run of an autoencoder (`vitok"
    assert main(["export", generator.uri, str(tmp_path / "weights")]) == 1
    assert f"{generator.uri} {sentence}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is the run of a generator"):
        load_autoencoder(generator.uri)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="other is no run; give the run of an autoencoder"):
        load_autoencoder(str(tmp_path / "other"))


def test_statistics_of_the_cache_outlive_it_in_the_run(finished_run) -> None:
    found = read_statistics(Folder.of(finished_run.run.folder.uri))
    assert len(found.mean) == len(found.std) == CHANNELS and min(found.std) > 0
