import json
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.cli import main
from jobs.evaluations import EVALUATIONS
from pipelines.baselines import REPOSITORIES
from tests.vitok.random_inception import write_inception
from vitok.variants import RELEASED


@pytest.fixture
def baselines(tmp_path: Path) -> list[str]:
    """Two autoencoders of diffusers with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
    )
    dc = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )
    for name, model in (("kl", kl), ("dc", dc)):
        model.save_pretrained(tmp_path / name)
    return [f"diffusers:{tmp_path / name},name={name}" for name in ("kl", "dc")]


def test_the_whole_command_judges_ours_baselines_and_codecs_by_all_metrics(
    tiny_weights: Path,
    tiny_dino: nn.Module,
    baselines: list[str],
    sample_manifests: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inception, digest = write_inception(tmp_path / "inception.pt")
    tiny_dino.save_pretrained(tmp_path / "dino")
    command = ["evaluate", "imagenet-256p", "--data", str(sample_manifests[1]), "--json"]
    command += ["--subjects", f"{tiny_weights},name=tiny", *baselines, "jpeg"]
    command += ["--square", "48", "64", "--out", str(tmp_path / "out")]
    command += ["--networks.inception", str(inception), "--networks.inception-digest", digest]
    command += ["--networks.dino", str(tmp_path / "dino")]
    command += ["--num-workers", "0", "--no-use-gpu"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(score["subject"], score["resolution"]) for score in scores] == [
        (name, f"square {side}") for name in ("tiny", "kl", "dc", "jpeg") for side in (48, 64)
    ]
    for score in scores:
        assert score["num_images"] == 5
        for name in ("psnr", "ssim", "rfid", "rfdd", "seconds"):
            assert score[name] is not None, (score["subject"], name)
    assert [score["compression_ratio"] for score in scores[::2]] == [48, 48, 1.5, None]
    assert scores[6]["rfid"] < scores[0]["rfid"], "JPEG is nearer to the image than noise"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "SD-VAE f8x4 (published)" in report


def test_weights_that_are_missing_are_named_with_where_they_are(
    tiny_weights: Path,
    sample_manifests: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", "quickstart", "--data", str(sample_manifests[1])]
    command += ["--out", str(tmp_path / "out"), "--subjects", str(tiny_weights)]
    for options, expected in (
        (["--networks.inception", "nowhere.pt"], "download https://nvlabs-fi-cdn.nvidia.com"),
        (["--networks.dino", "nowhere"], "set networks.dino to FOLDER"),
        (["--inception-reference", "x.npz"], "inception_reference needs the network"),
        (["flux2-vae"], "hf download black-forest-labs/FLUX.2-dev"),
    ):
        assert main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error


@pytest.mark.parametrize("name", EVALUATIONS)
def test_recipes_name_what_there_is(name: str) -> None:
    settings = EVALUATIONS[name]()
    for spec in settings.specs():
        assert spec.is_codec or spec.location in REPOSITORIES or spec.location in RELEASED, (
            spec.title
        )
    assert settings.use_gpu == (settings.num_workers > 0)
    assert settings.data == ""
    assert (EVALUATIONS[name].__doc__ or "").splitlines()[0].endswith(".")
