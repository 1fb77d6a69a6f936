import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor

from pipelines.autoencoder_weights import load_autoencoder
from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.evaluate import EvaluationResult, evaluate, statistics_name
from pipelines.evaluation import read_ahead
from pipelines.evaluation import worker as evaluation_worker
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.subjects import Subject, SubjectFacts
from pipelines.evaluation.worker import OK, ExtractorConfig
from pipelines.packed_rows import PackedRow
from pipelines.reading.decode import decode_rgb
from pipelines.reconstruction import ImageResult
from tests.vitok.random_inception import write_inception
from vitok.features import InceptionFeatures
from vitok.frechet import FeatureMoments, Gaussian, frechet_distance
from vitok.metrics import constant_patches, psnr, ssim
from vitok.packed import pack_images, unpack_images
from vitok.patches import fit_to_budget

BUDGET = 48


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in a process have the order of its threads, and a Ray worker of one core has one."""
    torch.set_num_threads(1)


@pytest.fixture
def inception(tmp_path: Path) -> ExtractorConfig:
    file, digest = write_inception(tmp_path / "inception.pt")
    return ExtractorConfig(inception=str(file), inception_digest=digest)


@pytest.fixture
def settings(
    sample_manifests: tuple[Path, Path], tiny_weights: Path, tmp_path: Path
) -> EvaluationConfig:
    return EvaluationConfig(
        subjects=(f"{tiny_weights},dtype=float32,name=tiny",),
        data=str(sample_manifests[0]),
        out=str(tmp_path / "evaluation"),
        token_budget=(BUDGET,),
        row_tokens=3 * BUDGET,
        slice_images=5,
        max_images=11,
        num_pictures=3,
        num_workers=0,
        use_gpu=False,
    )


def decoded(data: bytes) -> Tensor:
    """Return a whole image [3, H, W] in [-1, 1] as the size rule wants it."""
    height, width = decode_rgb(data).shape[:2]
    size = fit_to_budget(height, width, patch_size=16, token_budget=BUDGET)
    return torch.from_numpy(decode_rgb(data, size=size)).permute(2, 0, 1) / 127.5 - 1


def sources(settings: EvaluationConfig, keys: list[str]) -> list[Tensor]:
    """Read the images of keys, in their order."""
    manifest = Manifest.load(settings.data)
    records = manifest.records(np.arange(manifest.num_samples))
    chosen = records.take([records.key.tolist().index(key) for key in keys])
    return [decoded(data) for data in read_samples(manifest, chosen)]


def test_results_equal_those_of_each_image_alone(
    settings: EvaluationConfig, tiny_weights: Path, inception: ExtractorConfig
) -> None:
    result = evaluate(replace(settings, networks=inception))
    images = result.images["tiny", f"token budget {BUDGET}"]
    keys = [image.key for image in images]
    assert keys == sorted(set(keys)) == result.keys
    assert len(keys) == 11, "every image once"

    model = load_autoencoder(str(tiny_weights))
    outputs = []
    originals = sources(settings, keys)
    for found, source in zip(images, originals, strict=True):
        with torch.no_grad():
            (output,) = unpack_images(model(pack_images([source], patch_size=16)).pixels, 16)
        outputs.append(output)
        assert (found.height, found.width) == source.shape[1:]
        assert found.num_tokens == -(-source.shape[1] // 16) * -(-source.shape[2] // 16) <= BUDGET
        assert found.metrics.psnr == pytest.approx(psnr(output, source), abs=1e-3)
        assert found.metrics.ssim == pytest.approx(ssim(output, source), abs=1e-4)
        baseline = psnr(constant_patches(source, 16), source)
        assert found.metrics.baseline_psnr == pytest.approx(baseline, abs=1e-3)
        assert found.seconds > 0
        assert found.status == OK
    assert len({image.metrics.psnr for image in images}) == 11

    (score,) = result.scores
    mean = math.fsum(image.metrics.psnr for image in images) / 11
    assert score.metrics.psnr == pytest.approx(mean, rel=1e-12)
    assert (score.num_images, score.num_failed) == (11, 0)
    assert score.compression_ratio == 3 * 16**2 / 16
    assert score.bits_per_pixel == 16 * 16 / 16**2

    network = InceptionFeatures.load(inception.inception, inception.inception_digest)
    original, reconstructed = (
        FeatureMoments.of([network(batch)]).gaussian() for batch in (originals, outputs)
    )
    assert score.rfid == pytest.approx(frechet_distance(original, reconstructed), rel=1e-3)
    assert score.rfid > 0.01
    assert score.rfdd is None
    assert any("11 images for 12 features" in warning for warning in score.warnings)


def test_worst_images_come_first_and_best_last_in_the_pictures(settings: EvaluationConfig) -> None:
    result = evaluate(settings)
    (images,) = result.images.values()
    (pictures,) = result.pictures.values()
    by_psnr = [image.key for image in sorted(images, key=lambda image: image.metrics.psnr)]
    assert list(pictures) == [*by_psnr[:2], by_psnr[-1]]
    for key, source in zip(pictures, sources(settings, list(pictures)), strict=True):
        height, width = source.shape[1:]
        assert pictures[key].shape == (height, 3 * width + 8, 3)
        shown = ((source + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pictures[key][:, :width], shown)


def measured(result: EvaluationResult) -> tuple[list, list]:
    """Return what two evaluations must have in common: all but the time and memory they took."""
    scores = [replace(score, seconds=None, peak_mb=None) for score in result.scores]
    rows = [
        replace(image, seconds=None, peak_mb=None)
        for images in result.images.values()
        for image in images
    ]
    return scores, rows


def test_metrics_are_identical_here_on_2_and_4_workers_and_for_shuffled_input(
    ray_cluster: None, settings: EvaluationConfig, inception: ExtractorConfig, tmp_path: Path
) -> None:
    settings = replace(settings, networks=inception)
    here = evaluate(settings)
    expected = measured(here)
    assert expected[0][0].rfid > 0
    assert len(expected[1]) == 11
    # Half of the processes: the sources are a subject like any other.
    here.references[f"token budget {BUDGET}", "inception"].save(tmp_path / "reference.npz")
    reference = str(tmp_path / "reference.npz")
    for num_workers in (2, 4):
        on_ray = replace(
            settings,
            num_workers=num_workers,
            cpus_per_worker=1.0,
            inception_reference=reference,
        )
        assert measured(evaluate(on_ray)) == expected, num_workers

    manifest = Manifest.load(settings.data)
    order = np.random.default_rng(0).permutation(manifest.num_samples)
    records = manifest.records(order)
    samples = [
        {"__key__": key, "jpg": data}
        for key, data in zip(records.key, read_samples(manifest, records), strict=True)
    ]
    shards = write_shards(samples, tmp_path / "shards", "shuffled", 7)
    shuffled = build_manifest(shards, tmp_path / "manifest")
    assert (
        shuffled.records(np.arange(5)).key.tolist() != manifest.records(np.arange(5)).key.tolist()
    )
    assert measured(evaluate(replace(settings, data=str(shuffled.path)))) == expected


def failing_subject(spec: object, device: torch.device) -> Subject:
    """Reconstruct without a fault, but for wide images, and with nothing but NaN for tall ones."""

    def reconstruct(images: list[Tensor]) -> list[Tensor]:
        if any(image.shape[2] > image.shape[1] for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        if any(image.shape[1] > 2 * image.shape[2] for image in images):
            raise TypeError("an image of this shape\nis new to me")
        return [torch.full_like(x, torch.nan) if len(x[0]) > x.shape[2] else x for x in images]

    return Subject(SubjectFacts(), reconstruct)


def test_a_subject_that_fails_on_an_image_fails_on_no_other(
    settings: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"wide": (40, 60), "tall": (60, 40), "thin": (90, 40), "a": (32, 32), "b": (48, 48)}
    rng = np.random.default_rng(0)
    samples = [
        {
            "__key__": key,
            "jpg": simplejpeg.encode_jpeg(rng.integers(0, 255, (*size, 3), dtype=np.uint8)),
        }
        for key, size in shapes.items()
    ]
    samples.append({"__key__": "cut", "jpg": samples[0]["jpg"][: len(samples[0]["jpg"]) // 2]})
    manifest = build_manifest(write_shards(samples, tmp_path / "s", "s", 9), tmp_path / "manifest")
    monkeypatch.setattr(evaluation_worker, "load_subject", failing_subject)
    result = evaluate(replace(settings, data=str(manifest.path)))
    (images,) = result.images.values()
    assert {image.key: image.status.split(":")[0] for image in images} == {
        "a": "ok",
        "b": "ok",
        "cut": "unreadable",
        "tall": "failed",
        "thin": "failed",
        "wide": "out of memory",
    }
    status = {image.key: image.status for image in images}
    assert status["tall"].endswith("the reconstruction holds values that are not finite")
    assert status["thin"] == "failed: TypeError: an image of this shape"
    assert (result.scores[0].num_images, result.scores[0].num_failed) == (2, 4)
    assert result.scores[0].metrics.psnr == pytest.approx(100), "of those that came back"


def test_a_subject_that_cannot_be_loaded_is_named_and_the_others_evaluated(
    settings: EvaluationConfig, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    saved: list[tuple[int, int]] = []
    result = evaluate(
        replace(settings, subjects=(nowhere, "jpeg,bits_per_pixel=2", "webp,bits_per_pixel=2")),
        lambda found: saved.append((len(found.failed), len(found.scores))),
    )
    assert saved == [(1, 1), (1, 2)], "what is found so far"
    assert result.scores.pop().subject == "webp"
    assert [score.subject for score in result.scores] == ["jpeg"]
    assert result.failed[nowhere].startswith(f"{nowhere} holds no encoder.safetensors; give the")
    with pytest.raises(ValueError, match="holds no encoder"):
        evaluate(replace(settings, subjects=(nowhere,)))


def test_codecs_take_the_bits_of_the_first_model(settings: EvaluationConfig) -> None:
    result = evaluate(replace(settings, subjects=("webp", *settings.subjects)))
    assert [(score.subject, score.bits_per_pixel) for score in result.scores] == [
        ("tiny", 1.0),
        ("webp", 1.0),
    ]
    with pytest.raises(ValueError, match="no model whose bits per pixel webp could take"):
        evaluate(replace(settings, subjects=("webp",)))


def test_a_given_reference_takes_the_place_of_the_sources(
    settings: EvaluationConfig, inception: ExtractorConfig, tmp_path: Path
) -> None:
    settings = replace(settings, networks=inception, token_budget=(BUDGET, 20), num_pictures=0)
    usual = evaluate(settings)
    for (resolution, network), gaussian in usual.references.items():
        gaussian.save(tmp_path / statistics_name(network, resolution))
    found = evaluate(replace(settings, inception_reference=str(tmp_path)))
    assert [score.rfid for score in found.scores] == [score.rfid for score in usual.scores]
    assert usual.scores[0].rfid != usual.scores[1].rfid

    place = (f"token budget {BUDGET}", "inception")
    other = Gaussian(usual.references[place].mean + 1, usual.references[place].covariance)
    other.save(tmp_path / "other.npz")
    settings = replace(settings, inception_reference=str(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match="is of one resolution, and there are 2; give the folder"):
        evaluate(settings)
    (score,) = evaluate(replace(settings, token_budget=(BUDGET,))).scores
    assert score.rfid > usual.scores[0].rfid + 5
    assert any("does not say which weights" in warning for warning in score.warnings)
    with pytest.raises(ValueError, match="inception_reference needs the network"):
        evaluate(replace(settings, networks=ExtractorConfig()))


def test_latency_is_that_of_each_image_alone_after_a_first_pass(
    settings: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counting(spec: object, device: torch.device) -> Subject:
        return Subject(SubjectFacts(), lambda images: passes.append(len(images)) or list(images))

    monkeypatch.setattr(evaluation_worker, "load_subject", counting)
    result = evaluate(replace(settings, repeats=3, num_pictures=0))
    assert passes == [1] * (11 * 4)
    (images,) = result.images.values()
    assert all(image.seconds > 0 and image.peak_mb >= 0 for image in images)


def test_the_next_images_are_read_while_these_are_judged_and_never_during_a_pass(
    settings: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = threading.Condition()
    reads, passes = 0, 0
    load_row, judge = read_ahead.load_row, evaluation_worker.judge

    def counting_load(*arguments: object) -> PackedRow:
        nonlocal reads
        with changed:
            reads += 1
            changed.notify()
        return load_row(*arguments)

    def reconstruct(images: list[Tensor]) -> list[Tensor]:
        nonlocal passes
        passes += 1
        time.sleep(0.02)  # a reader that did not wait would have begun by then
        assert reads == passes, "a pass has the machine to itself"
        return list(images)

    def waiting_judge(*arguments: object) -> ImageResult:
        with changed:
            begun = changed.wait_for(lambda: reads > passes or passes == num_rows, timeout=20)
        assert begun, "nobody reads the next images"
        return judge(*arguments)

    num_rows = 5  # slices of 5, 5 and 1 images, about 3 of which fill a row
    monkeypatch.setattr(read_ahead, "load_row", counting_load)
    monkeypatch.setattr(evaluation_worker, "judge", waiting_judge)
    subject = Subject(SubjectFacts(), reconstruct)
    monkeypatch.setattr(evaluation_worker, "load_subject", lambda *_: subject)
    result = evaluate(replace(settings, num_pictures=0))
    assert passes == reads == num_rows
    assert result.scores[0].num_images == 11


def test_lpips_compares_whole_images(
    settings: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MeanDifference(torch.nn.Module):
        def forward(self, output: Tensor, source: Tensor) -> Tensor:
            assert output.shape == source.shape
            assert output.abs().max() <= 1
            return (output - source).abs().mean().reshape(1, 1, 1, 1)

    def load(weights: str, option: str, without: str) -> torch.nn.Module:
        assert weights == str(tmp_path / "vgg.safetensors")
        return MeanDifference()

    monkeypatch.setattr(evaluation_worker, "load_lpips", load)
    (tmp_path / "vgg.safetensors").touch()
    networks = ExtractorConfig(lpips=str(tmp_path / "vgg.safetensors"))
    result = evaluate(replace(settings, networks=networks, max_images=3))
    (images,) = result.images.values()
    model = load_autoencoder(settings.specs()[0].location)
    for found, source in zip(images, sources(settings, result.keys), strict=True):
        (output,) = model.decode(model.encode(source))
        assert found.metrics.lpips == pytest.approx((output - source).abs().mean().item(), rel=1e-3)
    mean = sum(image.metrics.lpips for image in images) / 3
    assert result.scores[0].metrics.lpips == pytest.approx(mean)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"token_budget": ()}, "no resolution; give square, longest_side or token_budget"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"repeats": -1}, "repeats=-1 must be at least 0"),
        ({"timeout_s": 0.0}, "timeout_s and cpus_per_worker must be above 0"),
        ({"benchmark": "imagenet"}, "benchmark='imagenet' is none of imagenet-256p, div8k"),
        ({"subjects": ("a", "a")}, "the subjects a, a need different names; add name="),
        (
            {"subjects": ("a,windw=8",)},
            "a,windw=8: 'windw=8' is no option; write option=value, of name",
        ),
        ({"subjects": ("a,window",)}, "'window' is no option; write option=value"),
        ({"subjects": ("jpeg,window=8",)}, "are for our models, and jpeg is none"),
        ({"subjects": ("sd-vae,bits_per_pixel=8",)}, "sd-vae is neither jpeg nor webp"),
        ({"subjects": ("a,dtype=int8",)}, "int8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: EvaluationConfig, change: dict, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(settings, **change)
