"""Studies of generators and autoencoders: their pairs, and a small one from end to end."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.caching.config import LatentCaching
from pipelines.generation import joint
from pipelines.generation.joint import (
    CURVES,
    JointScaling,
    draw_study,
    pairs_of,
    prepare_study,
    run_study,
)
from pipelines.train_flow import FlowTraining, read_settings
from tests.pipelines.flow_runs import flow_training
from vitok.storage import Folder

POINTS = ("model.depth=1", "model.depth=2 model.width=32 optim.lr=1e-3")


@pytest.fixture
def study(tmp_path: Path) -> JointScaling:
    return JointScaling(
        name="study",
        autoencoders=(str(tmp_path / "small"), "350M-f16x64"),
        generators=POINTS,
        encoding=LatentCaching(manifest=str(tmp_path / "manifest"), squares=(64,)),
        training=flow_training(tmp_path),
        smooth=1,
    )


def test_pairs_are_all_generators_on_the_latents_of_each_autoencoder(
    study: JointScaling, tmp_path: Path
) -> None:
    pairs = pairs_of(prepare_study(study))
    names = ["small-depth_1", "small-depth_2-width_32-lr_1e-3"]
    assert [pair.run.name for pair in pairs] == [
        *names,
        *(name.replace("small", "350M-f16x64") for name in names),
    ]
    assert [(pair.model.depth, pair.model.width) for pair in pairs] == [(1, 16), (2, 32)] * 2
    assert [pair.optim.lr for pair in pairs] == [3e-3, 1e-3] * 2
    folder = tmp_path / "runs" / "study"
    assert [pair.cache for pair in pairs] == [
        str(folder / "latents" / name) for name in ("small", "small", "350M-f16x64", "350M-f16x64")
    ]
    assert {pair.run.folder.uri.rpartition("/")[0] for pair in pairs} == {str(folder)}
    assert {pair.autoencoder for pair in pairs} == set(study.autoencoders)
    # One MLflow record beside the other runs of the storage.
    assert {pair.run.tracking.uri for pair in pairs} == {f"sqlite:///{tmp_path}/runs/mlflow.db"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generators": ("model.dept=1",)}, "no field 'model.dept'; did you mean model.depth"),
        ({"generators": ("depth 1",)}, "'depth' is no FIELD=VALUE"),
        ({"generators": ("model.depth=x",)}, r"generator 'model.depth=x' .*model.depth"),
        ({"generators": ()}, "lists of at least one each"),
        ({"autoencoders": ("a/export", "b/export")}, "more than one export-depth_1"),
        ({"name": "a/b"}, "name='a/b' must be a plain name"),
        ({"encoding": LatentCaching(squares=(64,))}, "manifest is empty"),
    ],
)
def test_studies_that_cannot_run_are_refused_before_anything_starts(
    study: JointScaling, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_study(replace(study, **change))


def test_each_autoencoder_is_encoded_once_and_its_channels_are_the_generators(
    study: JointScaling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[LatentCaching] = []
    trained: list[FlowTraining] = []
    made = Folder.of(study.training.cache)

    def encode(settings: LatentCaching) -> None:
        encoded.append(settings)
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.out).symlink_to(made.uri)

    monkeypatch.setattr(joint, "cache_latents", encode)
    monkeypatch.setattr(joint, "run_training", trained.append)
    own = study.training.autoencoder
    model = replace(study.training.model, latent_channels=64)
    study = replace(study, autoencoders=(own,), training=replace(study.training, model=model))
    steps: Iterator[FlowTraining] = run_study(prepare_study(study))
    assert [training.model.depth for training in steps] == [1, 2]
    assert [settings.model for settings in encoded] == [own]
    assert [training.model.latent_channels for training in trained] == [5, 5]
    assert [training.model.depth for training in trained] == [1, 2]
    for training in trained:
        assert read_settings(training.run.folder) == training

    monkeypatch.setattr(
        "pipelines.generation.flow_curves.metric_history", lambda run, metric: [(4, 0.5), (8, 0.25)]
    )
    curves = draw_study(prepare_study(study))
    assert [curve.name for curve in curves] == [training.run.name for training in trained]
    assert curves[1].flops[0] > curves[0].flops[0]
    drawn = Image.open(io.BytesIO(study.folder.read_bytes(CURVES)))
    assert np.asarray(drawn).std() > 0
