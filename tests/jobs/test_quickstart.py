import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from torch import nn

from jobs import flow_recipes, quickstart, recipes
from jobs.cli import main
from jobs.sample_corpus import make_sample_corpus
from pipelines import train_autoencoder
from pipelines.autoencoder_training import AutoencoderTraining
from pipelines.autoencoder_weights import load_autoencoder
from pipelines.caching.config import LatentCaching
from pipelines.caching.verify import verify_here
from pipelines.latents import LatentCache
from pipelines.runs import next_step
from pipelines.tracking import TrackingConfig, open_run, tracking_uri
from pipelines.train_flow import FlowTraining
from tests.conftest import tiny_model
from tests.pipelines.flow_runs import flow_training, write_checkpoint
from tests.vitok.random_inception import write_inception
from vitok.pretrained import encoder_digest
from vitok.storage import Folder


def tiny_quickstart() -> AutoencoderTraining:
    """The recipe of the quickstart with a few thousand weights, for one worker and three steps."""
    base = REAL_RECIPE()
    return replace(
        base,
        model=tiny_model(replace(base.model, latent_channels=16)),
        data=replace(base.data, row_tokens=128),
        stages=(
            replace(base.stages[0], steps=2, images_per_step=6, token_budgets=(16,)),
            replace(base.stages[1], steps=1, images_per_step=4, token_budgets=(36,)),
        ),
        loss=replace(base.loss, ssim_tile=32),
        run=replace(base.run, num_workers=1, mfu=False, log_every=1),
    )


REAL_RECIPE = recipes.quickstart


def run_id_of(storage: Path) -> str:
    return json.loads((storage / "quickstart" / "mlflow.json").read_text())["run_id"]


def test_quickstart_shows_the_whole_system_continues_and_starts_over(
    ray_cluster: None,
    tmp_path: Path,
    tiny_dino: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recipes, "quickstart", tiny_quickstart)
    small_corpus = partial(make_sample_corpus, num_train=40, num_eval=4)
    monkeypatch.setattr(quickstart, "make_sample_corpus", small_corpus)
    quickstart.run_quickstart(str(tmp_path))
    _check_summary(capsys.readouterr().out, tmp_path)
    _check_latents(tmp_path)
    first = run_id_of(tmp_path)
    _check_record(tmp_path, first)
    _check_evaluation(tmp_path, tiny_dino)
    capsys.readouterr()

    with monkeypatch.context() as patched:
        patched.setattr(train_autoencoder, "_worker", None)  # would fail if it were started
        quickstart.run_quickstart(str(tmp_path))
        out = capsys.readouterr().out
    assert "training: finished by an earlier quickstart; --fresh starts over" in out
    _check_summary(out, tmp_path)
    assert run_id_of(tmp_path) == first
    _check_record(tmp_path, first)

    def begin(settings: AutoencoderTraining) -> None:
        run = settings.run
        with open_run(run.folder, run.name, run.tracking, run.storage, settings):
            assert next_step(run.folder) == 0, "nothing of the earlier run is there"
            raise KeyboardInterrupt  # what comes now is what came the first time

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(quickstart, "run_training", begin)
        quickstart.run_quickstart(str(tmp_path), fresh=True)
    assert "[2/5] training: 3 steps at 16 then 36 tokens an image" in capsys.readouterr().out
    assert not (tmp_path / "quickstart" / "latents").exists()
    assert run_id_of(tmp_path) != first
    _check_record(tmp_path, first)  # what is deleted is the folder, not the history


def _check_summary(out: str, storage: Path) -> None:
    assert [f"[{number}/5]" in out for number in range(1, 6)] == [True] * 5
    table = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", out.partition("Done in")[2], re.MULTILINE))
    document = json.loads((storage / "quickstart/evaluation/results.json").read_text())
    (scores,) = document["scores"]
    assert table["PSNR of the reconstructions"] == f"{scores['psnr']:.2f} dB"
    baseline = table["PSNR of one colour for each 16 x 16 patch"]
    assert baseline == f"{scores['baseline_psnr']:.2f} dB"
    assert table["SSIM"] == f"{scores['ssim']:.3f}"
    assert scores["num_images"] == 4
    assert float(table["training speed, at the end"].removesuffix(" tokens/s").replace(",", "")) > 0
    assert 0 < float(table["token utilisation, at the end"]) <= 1
    for name in ("picture", "weights", "latents", "corpus"):
        assert Path(table[name]).exists(), name
        assert Path(table[name]).is_relative_to(storage / "quickstart")
    with Image.open(table["picture"]) as picture:
        assert np.asarray(picture).std() > 10, "not one colour"
    assert f" ui --storage {storage}\n" in out
    assert f" reconstruct IMAGE --model {storage}/quickstart\n" in out


def _check_latents(storage: Path) -> None:
    model = load_autoencoder(str(storage / "quickstart"))
    cache = LatentCache(str(storage / "quickstart" / "latents"), encoder_digest(model))
    assert verify_here(cache.location).bad == []
    assert len(cache) == 40


def _check_evaluation(storage: Path, dino: nn.Module) -> None:
    """Judge the model of the quickstart by all metrics, with random networks."""
    inception, digest = write_inception(storage / "inception.pt")
    dino.save_pretrained(storage / "dino")
    command = ["evaluate", "quickstart", "--subjects", str(storage / "quickstart")]
    command += ["--data", str(storage / "quickstart" / "corpus" / "eval")]
    command += ["--networks.inception", str(inception), "--networks.inception-digest", digest]
    command += ["--networks.dino", str(storage / "dino"), "--out", str(storage / "judged")]
    assert main(command) == 0
    (score,) = json.loads((storage / "judged" / "results.json").read_text())["scores"]
    client = MlflowClient(tracking_uri(TrackingConfig(), str(storage)))
    logged = client.get_run(run_id_of(storage)).data.metrics
    for name in ("psnr", "ssim", "rfid", "rfdd"):
        assert score[name] > 0
        assert logged[f"evaluation/judged/token_budget_256/{name}"] == score[name]


def _check_record(storage: Path, run_id: str) -> None:
    client = MlflowClient(tracking_uri(TrackingConfig(), str(storage)))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(run_id, "loss")] == [1, 2, 3], "once a step"
    assert run.data.params["model.encoder_width"] == "32"
    assert run.data.params["stages.1.token_budgets"] == "[36]"
    assert "export" in run.data.tags
    finals = client.get_metric_history(run_id, "final_eval_psnr")
    assert [point.step for point in finals] == [3], "once, however often the quickstart ran"
    assert run.data.metrics["latent_bytes"] > 0

    def artifacts(folder: str) -> set[str]:
        return {Path(file.path).name for file in client.list_artifacts(run_id, folder)}

    assert artifacts("evaluation") >= {"results.json", "reconstructions.png"}
    assert artifacts("latents") == {"manifest.json"}
    assert artifacts("weights") == {"config.json", "encoder.safetensors", "decoder.safetensors"}
    assert any(name.endswith(".png") for name in artifacts("images"))


def test_flow_stage_trains_on_squares_of_the_quickstart_and_draws_every_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = flow_training(tmp_path)
    folder = tmp_path / "quickstart"
    folder.mkdir()
    (tmp_path / "autoencoder").rename(folder / "export")
    monkeypatch.setattr(flow_recipes, "flow_quickstart", lambda: tiny)

    def train(settings: FlowTraining) -> Folder:
        assert settings.cache == str(folder / "latents-squares")
        assert settings.autoencoder == str(folder / "export")
        write_checkpoint(settings)
        return settings.run.folder

    def cache(settings: LatentCaching) -> None:
        assert settings.squares == (32,) and not settings.token_budgets
        assert settings.manifest == str(folder / "corpus" / "train")
        (tmp_path / "cache").rename(settings.out)

    monkeypatch.setattr(quickstart.train_flow, "run_training", train)
    monkeypatch.setattr(quickstart, "cache_latents", cache)
    monkeypatch.setattr(quickstart, "ray_session", nullcontext)
    sheet = quickstart.generate_samples(str(tmp_path / "runs"), folder)
    assert "[flow] latents of squares, then a generator of 6 classes" in capsys.readouterr().out
    pixels = np.asarray(Image.open(sheet))
    # Pictures of 32 x 48 pixels: four for each class.
    assert pixels.shape[1] >= 24 * 48 and (pixels != 255).any(axis=2).sum() > 20 * 32 * 48
