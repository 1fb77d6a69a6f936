import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.vitok.weight_folders import assert_same, forget_config
from vitok.autoencoder import Autoencoder
from vitok.checkpoint import PROGRESS_FILE
from vitok.config import to_dict
from vitok.pretrained import load_pretrained, save_pretrained
from vitok.storage import Folder

ENCODER, DECODER, CONFIG = "encoder.safetensors", "decoder.safetensors", "config.json"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_checkpoint(folder: Path, model: Autoencoder, **surplus: torch.Tensor) -> None:
    """Write what a training in progress writes, optimizer and all."""
    weights = model.state_dict()
    state = {
        "model": weights | surplus,
        "optimizer": {"state": {name: {"exp_avg": x + 1} for name, x in weights.items()}},
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / PROGRESS_FILE).write_text('{"cursor": {"step": 3}}')


def write_run(folder: Path, model: Autoencoder) -> None:
    """Write the config of a training of this model."""
    folder.mkdir(parents=True)
    config = {"model": to_dict(model.config), "run": {"name": "mine"}}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("part", [None, "encoder", "decoder"])
@pytest.mark.parametrize("kind", [{}, {"latent": "kl"}, {"encoder_width": 0}])
def test_checkpoint_of_a_training_is_a_model(
    make_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    kind: dict[str, object],
    part: str | None,
) -> None:
    if "encoder_width" in kind:
        kind = {"encoder_width": 0, "encoder_depth": 0, "encoder_heads": 0}
    model = make_autoencoder(**kind)
    write_checkpoint(tmp_path / "step-3", model)
    loaded = load_pretrained(str(tmp_path / "step-3"), part=part)
    assert loaded.config == model.config
    assert_same(loaded, model, part)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    half = load_pretrained(tmp_path / "step-3", part=part, dtype=torch.bfloat16)
    assert_same(half, model.to(torch.bfloat16), part)


@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_without_weights_a_model_is_checked_by_headers_alone(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path, kind: str
) -> None:
    model = make_autoencoder()
    if kind == "weights":
        save_pretrained(tmp_path, model.config, model.state_dict())
        data = tmp_path / DECODER
    else:
        write_checkpoint(tmp_path, model)
        (data,) = tmp_path.glob("*.distcp")
    found = load_pretrained(tmp_path, meta=True)
    assert found.config == model.config
    assert all(parameter.is_meta for parameter in found.parameters())
    shapes, expected = (
        {name: tuple(parameter.shape) for name, parameter in either.named_parameters()}
        for either in (found, model)
    )
    assert shapes == expected
    os.truncate(data, data.stat().st_size - 1)
    if kind == "weights":
        with pytest.raises(ValueError, match=f"{DECODER} is damaged: .* bytes where its header"):
            load_pretrained(tmp_path, meta=True)
    else:
        data.unlink()
        assert load_pretrained(tmp_path, meta=True).config == model.config


def test_checkpoint_has_the_config_of_its_run(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder(latent="tanh")
    write_run(tmp_path / "mine", model)
    write_checkpoint(tmp_path / "mine" / "step-3", model)
    assert load_pretrained(tmp_path / "mine" / "step-3").config == model.config


def test_checkpoint_with_surplus_weights_is_refused(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "step-3", make_autoencoder(), extra=torch.zeros(3))
    with pytest.raises(ValueError, match="of another architecture: extra not expected"):
        load_pretrained(tmp_path / "step-3")
    load_pretrained(tmp_path / "step-3", part="encoder")


def test_unfinished_checkpoint_is_no_model(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, make_autoencoder())
    (tmp_path / PROGRESS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="or a checkpoint folder of a run"):
        load_pretrained(tmp_path)


def test_folder_of_a_run_stands_for_its_export(
    make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder()
    run = tmp_path / "mine"
    write_run(run, model)
    with pytest.raises(FileNotFoundError, match=rf"{run} is a training run without .* export/"):
        load_pretrained(run)
    save_pretrained(run / "export", model.config, model.state_dict())
    assert_same(load_pretrained(run), model)


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """An S3 server on loopback that both pyarrow and boto3 use; gives the URI of a bucket."""
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server], see extra dev")
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="models")
        yield "s3://models"
    server.stop()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.mark.parametrize("with_config", [True, False])
def test_object_store_holds_models_too(
    object_store: str,
    scratch: Path,
    make_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    with_config: bool,
) -> None:
    model = make_autoencoder(latent="kl")
    folder = tmp_path / "weights"
    save_pretrained(folder, model.config, model.state_dict())
    if not with_config:
        forget_config(folder)
    location = f"{object_store}/folder-{with_config}"
    with pytest.raises(FileNotFoundError, match=rf"{location} holds no encoder.safetensors"):
        load_pretrained(location)
    Folder.of(location).upload(folder)
    loaded = load_pretrained(location)
    assert loaded.config == model.config
    assert_same(loaded, model)
    assert not list(scratch.iterdir())


def test_object_store_gives_no_more_than_the_part_asked_for(
    object_store: str, scratch: Path, make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder(latent="kl")
    folder = tmp_path / "weights"
    save_pretrained(folder, model.config, model.state_dict())
    forget_config(folder)
    decoder = (folder / DECODER).read_bytes()
    (folder / DECODER).write_bytes(decoder[: 8 + int.from_bytes(decoder[:8], "little")])
    location = f"{object_store}/half"
    Folder.of(location).upload(folder)
    loaded = load_pretrained(location, part="encoder")
    assert loaded.config == model.config
    assert_same(loaded, model, "encoder")
    with pytest.raises(ValueError, match="decoder.safetensors is damaged"):
        load_pretrained(location)
    assert not list(scratch.iterdir())


def test_object_store_holds_checkpoints_and_runs(
    object_store: str, scratch: Path, make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder(latent="tanh")
    run = tmp_path / "mine"
    write_run(run, model)
    write_checkpoint(run / "step-3", model)
    location = f"{object_store}/runs/mine"
    Folder.of(location).upload(run)
    for part in (None, "encoder"):
        loaded = load_pretrained(f"{location}/step-3/", part=part)
        assert loaded.config == model.config
        assert_same(loaded, model, part)
    with pytest.raises(FileNotFoundError, match=rf"{location} is a training run without"):
        load_pretrained(location)
    save_pretrained(run / "export", model.config, model.state_dict())
    Folder.of(location).child("export").upload(run / "export")
    assert_same(load_pretrained(location), model)
    assert not list(scratch.iterdir())
