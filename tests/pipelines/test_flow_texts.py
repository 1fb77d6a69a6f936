"""Flow models of texts: from the cache into the step, and from a prompt to a sample."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.cli import main
from pipelines.generation.sampling import (
    Request,
    condition_of,
    embed_texts,
    load_text_encoder,
    sample_requests,
)
from pipelines.ingest import load_share, load_step, shares_of_step
from pipelines.latents import LatentCache
from pipelines.packed_rows import empty_row, iterate_steps, record_of
from pipelines.train_flow import (
    FlowTraining,
    condition_of_row,
    corpus_of,
    flow_step,
    plan_of,
    prepare,
    read_statistics,
    shown_requests,
)
from tests.pipelines.flow_runs import flow_training, make_run_of_texts, write_checkpoint
from tests.pipelines.small_caches import TEXT
from tests.vitok.text_encoders import save_text_encoder
from vitok.dit import DiT
from vitok.flow import SamplerConfig
from vitok.initialize import start_at_random
from vitok.texts import TextEncoder

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> FlowTraining:
    return flow_training(tmp_path, text=TEXT)


def scattered_model(settings: FlowTraining) -> DiT:
    """Build a model whose velocity is not zero."""
    model = DiT(settings.model)
    start_at_random(model, seed=1)
    torch.nn.init.normal_(model.to_velocity.weight, std=0.3)
    torch.nn.init.normal_(model.text_embed.weight, std=1.0)
    return model


def test_rows_hold_the_text_of_each_image_in_its_slot(settings) -> None:
    corpus, plan = corpus_of(settings), plan_of(settings)
    text_of = {row.key: row.text for row in LatentCache(settings.cache)}
    lengths = set()
    for row in (row for step in range(3) for row in load_step(plan, step)):
        condition = condition_of_row(corpus, row, CPU)
        assert condition.text is not None
        assert condition.text_tokens is not None
        assert condition.text.shape == (len(row.image_size), TEXT.max_tokens, TEXT.channels)
        assert condition.labels.tolist() == row.label.tolist()
        for slot, key in enumerate(row.keys):
            expected = text_of[key]
            length = 0 if expected is None else len(expected)
            assert condition.text_tokens[slot] == length
            assert not condition.text[slot, length:].any()
            if expected is not None:
                assert torch.equal(condition.text[slot, :length], expected)
            lengths.add(length)
        assert not condition.text_tokens[len(row.keys) :].any()
    assert lengths == {0, 1, 2, 3, 4}
    assert plan.corpus.text_bytes == TEXT.max_tokens * TEXT.channels * 2


def test_rows_keep_their_texts_on_the_way_through_records(settings) -> None:
    rows = load_step(plan_of(settings), 0)
    rows.append(empty_row(rows[0]))
    (step,) = iterate_steps([record_of(rows, {})], 0)
    for row, wanted in zip(step.rows, rows, strict=True):
        assert row.texts is not None
        assert wanted.texts is not None
        assert np.array_equal(row.texts.values, wanted.texts.values)
        assert np.array_equal(row.texts.num_tokens, wanted.texts.num_tokens)
    assert rows[0].texts is not None
    assert rows[0].texts.num_tokens.any()
    assert step.rows[-1].texts is not None
    assert not step.rows[-1].texts.num_tokens.any()


def test_a_model_of_classes_alone_carries_no_texts(settings) -> None:
    alone = replace(settings, model=replace(settings.model, text_channels=0, text_tokens=0))
    (row, *_) = load_step(plan_of(alone), 0)
    assert row.texts is None
    assert condition_of_row(corpus_of(alone), row, CPU).text is None
    assert "texts" not in record_of([row], {})
    assert plan_of(alone).corpus.text_bytes == 0


def test_loss_of_a_step_with_texts_is_the_same_for_any_number_of_workers(settings) -> None:
    corpus, plan, model = corpus_of(settings), plan_of(settings), scattered_model(settings)

    def loss(num_workers: int, settings: FlowTraining) -> float:
        shares = shares_of_step(plan, 1, num_workers)
        rows = [row for share in shares for row in load_share(plan, share)]
        with torch.no_grad():
            terms = [flow_step(settings, corpus, model, row, CPU)["loss"] for row in rows]
        return sum(term.item() for term in terms)

    alone = loss(1, settings)
    assert alone > 1
    assert [loss(2, settings), loss(3, settings)] == pytest.approx([alone] * 2, rel=1e-5)
    dropped = loss(1, replace(settings, label_dropout=1.0))
    assert dropped != pytest.approx(alone, rel=1e-4)
    with torch.no_grad():
        model.text_embed.weight.mul_(-1)
    assert loss(1, settings) != pytest.approx(alone, rel=1e-4), "the texts count"
    assert loss(1, replace(settings, label_dropout=1.0)) == dropped, "and are dropped as classes"


def test_gradients_reach_the_layer_of_the_texts(settings) -> None:
    model = scattered_model(settings)
    (row, *_) = load_step(plan_of(settings), 0)
    flow_step(settings, corpus_of(settings), model, row, CPU)["loss"].backward()
    assert model.text_embed.weight.grad is not None
    assert model.text_embed.weight.grad.abs().max() > 1e-4


def test_settings_that_do_not_suit_the_texts_of_a_cache_are_refused(settings, tmp_path) -> None:
    assert prepare(settings).model == settings.model
    other = replace(settings.run, name="other")
    for change in ({"text_tokens": 5}, {"text_channels": 8}):
        wrong = replace(settings, model=replace(settings.model, **change), run=other)
        sentence = r"but the texts of .*cache have 3 channels and at most 4 tokens; set them to"
        with pytest.raises(ValueError, match=sentence):
            prepare(wrong)
    without = flow_training(tmp_path / "without")
    texts = {"text_channels": 3, "text_tokens": 4}
    with pytest.raises(ValueError, match=r"model\.text_channels=3 .* holds no texts; make a cache"):
        prepare(replace(without, model=replace(without.model, **texts)))


def test_shown_samples_are_of_the_texts_and_classes_of_the_first_images(settings) -> None:
    first = LatentCache(settings.cache).__getitems__(range(3))
    requests = shown_requests(settings, corpus_of(settings))
    assert [(r.seed, r.label, r.size) for r in requests] == [
        (seed, row.label, (32, 48)) for seed, row in enumerate(first)
    ]
    assert [r.text is None for r in requests] == [row.text is None for row in first]
    for request, row in zip(requests[1:], first[1:], strict=True):
        assert torch.equal(request.text, row.text)
    texts_alone = replace(settings, model=replace(settings.model, num_classes=0))
    assert {r.label for r in shown_requests(texts_alone, corpus_of(settings))} == {-1}


def test_a_sample_depends_on_its_text_and_not_on_those_of_others(settings) -> None:
    model, statistics = scattered_model(settings), corpus_of(settings).statistics
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 3, generator=generator) for length in (4, 1, 2)]
    requests = [Request(7, 1, (32, 48), text) for text in [*texts, None]]

    def sample(requests: list[Request]) -> list[torch.Tensor]:
        latents = sample_requests(
            model,
            requests,
            statistics,
            CPU,
            sampler=SamplerConfig(steps=2, guidance=2.0),
            times=settings.times,
            row_tokens=64,
        )
        return [latent.tokens for latent in latents]

    together = sample(requests)
    for i, request in enumerate(requests):
        torch.testing.assert_close(together[i], sample([request])[0], rtol=1e-4, atol=1e-4)
        for other in together[:i]:
            assert not torch.allclose(together[i], other, atol=0.01)
    condition = condition_of(requests, settings.model)
    assert condition.text_tokens is not None
    assert condition.text_tokens.tolist() == [4, 1, 2, 0]


@pytest.fixture
def run_of_texts(tmp_path: Path) -> FlowTraining:
    return make_run_of_texts(tmp_path)


def test_vitok_sample_draws_the_texts_it_is_given(
    run_of_texts: FlowTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_texts.run.folder.uri
    texts = ["--text", "a red house", "the sea"]

    def sample(*given: str) -> np.ndarray:
        out = tmp_path / "sheet.png"
        options = ["--size", "32x48", "--steps", "2", "--count", "2", "--out", str(out)]
        assert main(["sample", run, *given, *options]) == 0
        return np.asarray(Image.open(out))

    sheet = sample(*texts)
    assert "4 images of 32 x 48 pixels" in capsys.readouterr().out
    assert np.array_equal(sheet, sample(*texts))
    assert not np.array_equal(sheet, sample("--text", "a red house", "two dog"))
    sample(*texts, "--class", "1", "2")
    assert "8 images of" in capsys.readouterr().out


def test_prompts_are_embedded_by_the_encoder_of_the_cache_alone(
    run_of_texts: FlowTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = read_statistics(run_of_texts.run.folder)
    encoder = TextEncoder.load(statistics.text_encoder, option="text_encoder")
    found = embed_texts(["a dog", "sea"], statistics, load_text_encoder(statistics, "", CPU))
    expected = encoder(["a dog", "sea"], 5)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    other = str(save_text_encoder(tmp_path / "other", seed=1))
    with pytest.raises(
        ValueError, match=r"other is the text encoder \w{12}, and the model learned"
    ):
        load_text_encoder(statistics, other, CPU)

    classes = prepare(flow_training(tmp_path / "classes"))
    write_checkpoint(classes)
    assert main(["sample", classes.run.folder.uri, "--text", "a dog"]) == 1
    assert "learned no texts; leave --text out" in capsys.readouterr().err
