import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants

from tests.vitok.weight_folders import assert_same, forget_config
from vitok import variants
from vitok.autoencoder import Autoencoder
from vitok.pretrained import load_pretrained, save_pretrained
from vitok.variants import AutoencoderConfig

RELEASED = "philippehansen/ViTok-v2-350M-f16x64"
ENCODER, DECODER, CONFIG = "encoder.safetensors", "decoder.safetensors", "config.json"


class Hub(ThreadingHTTPServer):
    """What hf_hub_download needs of Hugging Face: HEAD, and GET of ranges, of files by commit.

    Attributes:
        commits: repository -> revision -> commit.
        files: (repository, commit) -> name -> content.
        gated: repositories that nobody may read.
        requests: `METHOD name`, with the range if there is one, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Make a commit of a folder's files; returns its hash."""
        commit = f"{len(self.files):040x}"
        self.commits.setdefault(repository, {})[revision] = commit
        self.files[repository, commit] = {
            path.name: path.read_bytes() for path in sorted(folder.iterdir())
        }
        return commit

    def downloads(self) -> list[str]:
        """Names of the files that were sent whole; the list of requests starts anew."""
        names = [line.split()[1] for line in self.requests if line.split()[0] == "GET"]
        self.requests.clear()
        return names


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        if "/resolve/" not in self.path:  # what else huggingface_hub likes to know
            return self._refuse(404, "NotFound")
        owner, name, _, revision, file = self.path.strip("/").split("/")
        wanted = self.headers["Range"]
        method = self.command if wanted is None else f"{self.command}-{wanted}"
        self.server.requests.append(f"{method} {file}")
        repository = f"{owner}/{name}"
        if repository in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if repository not in self.server.commits:
            return self._refuse(404, "RepoNotFound")
        commits = self.server.commits[repository]
        commit = commits.get(revision, revision)
        if (repository, commit) not in self.server.files:
            return self._refuse(404, "RevisionNotFound")
        files = self.server.files[repository, commit]
        if file not in files:
            return self._refuse(404, "EntryNotFound", commit)
        body = files[file]
        if wanted is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last) + 1]
        self.send_response(200 if wanted is None else 206)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{commit}-{file}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback that huggingface_hub takes for Hugging Face, and an empty cache."""
    with Hub() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        use_hub(server.url, tmp_path, monkeypatch)
        yield server
        server.shutdown()


def use_hub(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub reads its environment when it is imported.
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Autoencoder:
    """A stand-in of a released model: its name, depths and patch, but tiny widths."""
    monkeypatch.setitem(variants.SIZES, "L", (16, 24, 2))
    return random_model(AutoencoderConfig.from_name("350M-f16x64"))


def random_model(config: AutoencoderConfig) -> Autoencoder:
    model = Autoencoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save_without_config(folder: Path, model: Autoencoder) -> Path:
    save_pretrained(folder, model.config, model.state_dict())
    forget_config(folder)
    return folder


@pytest.mark.parametrize("name", ["350M-f16x64", "ViTok-v2-350M-f16x64", RELEASED])
def test_released_model_is_downloaded_once_and_said_so(
    hub: Hub,
    released: Autoencoder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    hub.publish(RELEASED, save_without_config(tmp_path / "weights", released))
    loaded = load_pretrained(name)
    assert loaded.config == released.config
    assert_same(loaded, released)
    said = f"downloading {ENCODER} and {DECODER} from {hub.url}/{RELEASED}\n"
    assert capfd.readouterr().err.startswith(said)
    assert sorted(hub.downloads()) == [DECODER, ENCODER]

    assert_same(load_pretrained(name), released)
    assert capfd.readouterr().err == ""
    assert not hub.requests


def test_encoder_of_a_released_model_is_downloaded_alone(
    hub: Hub, released: Autoencoder, tmp_path: Path
) -> None:
    hub.publish(RELEASED, save_without_config(tmp_path / "weights", released))
    loaded = load_pretrained("350M-f16x64", part="encoder", dtype=torch.bfloat16)
    assert loaded.config == released.config
    assert_same(loaded, released.to(torch.bfloat16), "encoder")
    assert {line.split()[1] for line in hub.requests} == {ENCODER}
    assert hub.downloads() == [ENCODER]


def test_cached_weights_load_without_a_network(
    hub: Hub, released: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_without_config(tmp_path / "weights", released)
    hub.publish(RELEASED, weights)
    hub.publish("someone/tiny", weights)
    for name in (RELEASED, "someone/tiny"):
        load_pretrained(name)
    hub.requests.clear()
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        for name in (RELEASED, "someone/tiny"):
            assert_same(load_pretrained(name), released)
    assert not hub.requests
    hub.shutdown()
    hub.server_close()
    assert_same(load_pretrained("someone/tiny"), released)


def test_repository_of_anyone_says_its_config(
    hub: Hub, make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    model = make_autoencoder(latent="tanh")
    save_pretrained(tmp_path / "weights", model.config, model.state_dict())
    hub.publish("someone/tiny", tmp_path / "weights")
    loaded = load_pretrained("someone/tiny", part="decoder")
    assert loaded.config == model.config
    assert_same(loaded, model, "decoder")
    assert sorted(hub.downloads()) == [CONFIG, DECODER]
    assert load_pretrained("someone/tiny", part="encoder").config == model.config
    assert hub.downloads() == [ENCODER]


@pytest.mark.parametrize("with_foreign_config", [True, False])
def test_repository_without_our_config_needs_no_more_of_a_part_than_its_header(
    hub: Hub,
    make_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    with_foreign_config: bool,
) -> None:
    model = make_autoencoder(latent="kl")
    folder = save_without_config(tmp_path / "weights", model)
    if with_foreign_config:
        (folder / CONFIG).write_text('{"model_type": "another"}')
    hub.publish("someone/tiny", folder)
    loaded = load_pretrained("someone/tiny", part="encoder")
    assert loaded.config == model.config, "KL shows in the decoder's shapes alone"
    assert_same(loaded, model, "encoder")
    assert f"GET-bytes=0-100000 {DECODER}" in hub.requests
    assert sorted(hub.downloads()) == [CONFIG] * with_foreign_config + [ENCODER]
    assert load_pretrained("someone/tiny").config == model.config
    assert hub.downloads() == [DECODER]

    (folder / DECODER).unlink()
    hub.publish("someone/half", folder)
    half = load_pretrained("someone/half", part="encoder").config
    assert (half.latent_channels, half.latent, half.decoder_depth) == (12, "layernorm", 0)


def test_revision_of_a_repository_is_the_one_asked_for(
    hub: Hub, make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    models = {revision: make_autoencoder(seed=i) for i, revision in enumerate(("main", "v1"))}
    commits = {}
    for revision, model in models.items():
        save_pretrained(tmp_path / revision, model.config, model.state_dict())
        commits[revision] = hub.publish("someone/tiny", tmp_path / revision, revision)
    assert_same(load_pretrained("someone/tiny@v1"), models["v1"])
    assert_same(load_pretrained("someone/tiny"), models["main"])
    assert_same(load_pretrained(f"someone/tiny@{commits['v1']}"), models["v1"])


def test_files_of_two_commits_are_never_mixed(
    hub: Hub, make_autoencoder: Callable[..., Autoencoder], tmp_path: Path
) -> None:
    old, new = make_autoencoder(seed=0), make_autoencoder(seed=1)
    for name, model in (("old", old), ("new", new)):
        save_pretrained(tmp_path / name, model.config, model.state_dict())
    hub.publish("someone/tiny", tmp_path / "old")
    load_pretrained("someone/tiny", part="encoder")
    hub.publish("someone/tiny", tmp_path / "new")
    assert_same(load_pretrained("someone/tiny"), old)
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert_same(load_pretrained("someone/tiny"), new)


def test_what_cannot_be_downloaded_is_a_sentence_with_the_remedy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.gated.add("someone/gated")
    (tmp_path / "empty").mkdir()
    hub.publish("someone/empty", tmp_path / "empty")
    reasons = {
        RELEASED: "there is no such repository, or only for those who log in with `hf auth login`",
        "350M-f16x64": "there is no such repository, or only for those who log in",
        "someone/gated": "accept its terms on that page and log in with `hf auth login`",
        "someone/empty": "it has no such file",
        "someone/empty@v1": "it has no revision v1",
    }
    for name, reason in reasons.items():
        assert_refused(name, hub.url, reason)
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_refused("350M-f16x64", hub.url, "not in the cache, and HF_HUB_OFFLINE is set")
    hub.shutdown()
    hub.server_close()
    assert_refused("350M-f16x64", hub.url, "Connection refused")
    assert "downloading" not in capfd.readouterr().err


def assert_refused(name: str, url: str, reason: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(name, part="decoder")
    sentence = str(error.value)
    repository, _, revision = (RELEASED if "/" not in name else name).partition("@")
    option = f" --revision {revision}" if revision else ""
    assert sentence.startswith(f"cannot get {DECODER} of {name} from {url}/{repository} (")
    assert reason in sentence
    assert f"`hf download {repository}{option} --local-dir FOLDER`" in sentence
    assert f"give FOLDER instead of {name} (on the command line --model FOLDER)" in sentence
    assert "\n" not in sentence


def test_download_that_breaks_off_is_a_sentence(
    hub: Hub, tmp_path: Path, released: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(RELEASED, save_without_config(tmp_path / "weights", released))

    def full_disk(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full_disk)
    with pytest.raises(FileNotFoundError, match="No space left on device"):
        load_pretrained("350M-f16x64")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("350M-f16x65", "350M-f16x64"),
        ("ViTok-v2-5B-f32x265", "5B-f32x256"),
        ("Ld4-L/16x64", "350M-f16x64"),
        ("Td4-Td40/1x32x64", "5B-f32x64"),
        ("v1/S-L/16x64", ""),
        ("mymodel", ""),
    ],
)
def test_unknown_name_gives_the_nearest_and_the_forms(hub: Hub, name: str, nearest: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(name)
    sentence = str(error.value)
    assert sentence.startswith(f"{name!r} is neither a folder nor a model with weights; did you ")
    assert f"did you mean {nearest}" in sentence and "?" in sentence
    assert "owner/name@revision" in sentence and "s3://" in sentence
    assert not hub.requests


def test_folder_comes_before_a_name(
    hub: Hub,
    make_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_autoencoder()
    for name in ("350M-f16x64", "someone/tiny"):
        save_pretrained(tmp_path / name, model.config, model.state_dict())
        for location in (name, Path(name), f"file://{tmp_path}/{name}"):
            assert_same(load_pretrained(location), model)
    with pytest.raises(FileNotFoundError, match="holds no encoder.safetensors"):
        load_pretrained(Path("5B-f16x64"))
    assert not hub.requests
