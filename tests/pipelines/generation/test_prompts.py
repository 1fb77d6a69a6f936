"""Sets of images of captions: which text each gets, and what is refused."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from jobs.cli import main
from pipelines.generation.generate import (
    Generation,
    Generator,
    _identity,
    _prompts,
    _SampleUnits,
    generate,
    prepare_generation,
    shard_name,
    unit_requests,
)
from pipelines.generation.sampling import Request, load_text_encoder
from pipelines.latents import LatentCache
from pipelines.train_flow import FlowTraining, prepare, read_statistics
from tests.pipelines.flow_runs import SMALL_SET, flow_training, make_run_of_texts, write_checkpoint
from tests.pipelines.small_caches import TEXT
from tests.vitok.text_encoders import save_text_encoder
from vitok.config import to_dict
from vitok.flow import SamplerConfig

CPU = torch.device("cpu")
CAPTIONS = ["a red house", "the sea", "two dog near the blue house", "a cat"]
SAMPLER = SamplerConfig(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def run_of_texts(tmp_path_factory: pytest.TempPathFactory) -> FlowTraining:
    return make_run_of_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def generation(run_of_texts: FlowTraining, tmp_path: Path) -> Generation:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n")
    return Generation(
        model=run_of_texts.run.folder.uri,
        out=str(tmp_path / "samples"),
        captions=str(captions),
        num_images=10,
        size=(32, 48),
        sampler=SAMPLER,
        **SMALL_SET,
    )


def requests_of(generation: Generation) -> list[Request]:
    prompts = _prompts(generation, CPU)
    return [request for unit in range(3) for request in unit_requests(generation, unit, prompts)]


def sample_alone(generation: Generation, units: list[int]) -> list[bytes]:
    """Sample shards in this process, as a worker does."""
    board = SimpleNamespace(advance=SimpleNamespace(remote=lambda count: None))
    _SampleUnits(generation, board)({"unit": np.array(units)})
    return [(Path(generation.out) / shard_name(unit)).read_bytes() for unit in units]


def test_captions_of_a_file_come_in_turn_each_with_a_seed_of_its_own(
    run_of_texts: FlowTraining, generation: Generation
) -> None:
    requests = requests_of(generation)
    assert [request.seed for request in requests] == list(range(100, 110))
    assert [request.caption for request in requests] == [CAPTIONS[i % 4] for i in range(10)]
    assert {request.label for request in requests} == {-1}
    statistics = read_statistics(run_of_texts.run.folder)
    expected = load_text_encoder(statistics, "", CPU)(CAPTIONS, 5)
    assert [len(text) for text in expected] == [4, 3, 5, 3]
    for i, request in enumerate(requests):
        torch.testing.assert_close(request.text, expected[i % 4])


def test_texts_of_a_cache_come_in_its_order_with_the_classes_of_their_images(
    run_of_texts: FlowTraining, generation: Generation
) -> None:
    cache = LatentCache(run_of_texts.cache)
    requests = requests_of(replace(generation, captions=run_of_texts.cache, num_images=12))
    rows = [cache[i] for i in range(12)]
    assert [request.label for request in requests] == [row.label for row in rows]
    lengths = [0 if row.text is None else len(row.text) for row in rows]
    assert set(lengths) == {0, 1, 2, 3, 4, 5}
    for request, row in zip(requests, rows, strict=True):
        assert (request.text is None) == (row.text is None)
        assert request.text is None or torch.equal(request.text, row.text)
    more = replace(generation, captions=run_of_texts.cache, num_images=len(cache) + 2)
    prompts = _prompts(more, CPU)
    *_, first, second = prompts.of(range(len(cache) + 2))
    assert [first.label, second.label] == [rows[0].label, rows[1].label]


def test_set_of_captions_is_the_same_for_any_number_of_workers(
    ray_cluster: None, run_of_texts: FlowTraining, generation: Generation, tmp_path: Path
) -> None:
    alone = replace(generation, out=str(tmp_path / "alone"))
    expected = sample_alone(alone, [2, 0, 1])
    shards = generate(prepare_generation(generation))
    assert [Path(shard).read_bytes() for shard in shards] == [expected[i] for i in (1, 2, 0)]

    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [CAPTIONS[i % 4] for i in range(10)]
    pictures = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples]
    assert len({picture.tobytes() for picture in pictures}) == 10
    # As a sheet of `vitok sample` shows them: the same text and seed give the same image.
    generator = Generator.load(run_of_texts.run.folder, "", CPU, torch.float32)
    (again,) = generator.images([requests_of(generation)[5]], SAMPLER, row_tokens=24)
    assert np.abs(again.astype(int) - pictures[5]).max() <= 1

    Path(generation.captions).write_text("\n".join(reversed(CAPTIONS)))
    with pytest.raises(ValueError, match=r"holds other samples \(captions: '\w{64}' -> '\w{64}'\)"):
        prepare_generation(generation)


def test_set_of_classes_says_nothing_of_captions(
    generation: Generation,
) -> None:
    classes = replace(generation, captions="")
    assert [request.label for request in requests_of(classes)] == [i % 6 for i in range(10)]
    assert all(request.text is None for request in requests_of(classes))
    assert "captions" not in to_dict(_identity(classes))
    assert "captions" in to_dict(_identity(generation))


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `vitok generate` says when it refuses."""
    assert main(["generate", *arguments, "--no-use-gpu"]) == 1
    return capsys.readouterr().err


def test_captions_that_cannot_be_used_are_refused_with_a_sentence(
    generation: Generation,
    run_of_texts: FlowTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", generation.model, "--out", generation.out]
    captions = Path(generation.captions)
    lost = str(tmp_path / "lost.txt")
    assert f"there are no captions at {lost}; give" in complaint(
        [*given, "--captions", lost], capsys
    )
    captions.write_text("a dog\n\na cat\n")
    assert "line 2 is empty; write a caption on every line" in complaint(
        [*given, "--captions", str(captions)], capsys
    )
    captions.write_bytes(b"a dog\n\xff\n")
    assert "is not UTF-8 at its byte 6" in complaint([*given, "--captions", str(captions)], capsys)
    captions.write_text("a dog\n")
    other = str(save_text_encoder(tmp_path / "other", seed=1))
    assert "other is the text encoder" in complaint(
        [*given, "--captions", str(captions), "--text-encoder", other], capsys
    )
    assert not Path(generation.out).exists(), "what was refused claims no folder"


def test_generators_of_classes_and_of_texts_alone_name_what_they_lack(
    generation: Generation,
    run_of_texts: FlowTraining,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    classes = prepare(flow_training(tmp_path / "classes"))
    write_checkpoint(classes)
    out = ["--out", str(tmp_path / "samples")]
    of_classes = ["--model", classes.run.folder.uri, *out]
    said = complaint([*of_classes, "--captions", generation.captions], capsys)
    assert "the model learned no texts; leave captions out" in said
    texts = prepare(
        replace(
            run_of_texts,
            model=replace(run_of_texts.model, num_classes=0),
            run=replace(run_of_texts.run, storage=str(tmp_path / "runs")),
        )
    )
    write_checkpoint(texts)
    said = complaint(["--model", texts.run.folder.uri, *out], capsys)
    assert "the model learned texts and no classes; give captions" in said
    assert main(["sample", texts.run.folder.uri, "--class", "3"]) == 1
    assert "the model learned no classes; leave --class out" in capsys.readouterr().err
    other = replace(generation, model=run_of_texts.run.folder.uri, captions=classes.cache)
    with pytest.raises(ValueError, match="holds no texts"):
        requests_of(other)
    elsewhere = flow_training(tmp_path / "elsewhere", text=TEXT)
    with pytest.raises(ValueError, match=r"are others than the model learned \(channels: 12 -> 3"):
        requests_of(replace(other, captions=elsewhere.cache))
