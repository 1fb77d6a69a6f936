"""Autoencoders to and from files: folders, object stores, Hugging Face, checkpoints of a training.

Weights are two files, encoder.safetensors and decoder.safetensors, and perhaps our config.json.
"""

import difflib
import hashlib
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitok.autoencoder import Autoencoder, part_of
from vitok.checkpoint import CHECKPOINT_METADATA, is_checkpoint, load_weights, weight_shapes
from vitok.config import parse_config, parse_json, to_dict, write_config
from vitok.hub import fetch, fetch_shapes
from vitok.shapes import Shapes, config_of_shapes
from vitok.storage import Folder
from vitok.variants import RELEASED, AutoencoderConfig, Part, released_name

CONFIG_FILE = "config.json"
EXPORT = "export"
PARTS: tuple[Part, Part] = ("encoder", "decoder")
WEIGHT_FILES = tuple(f"{part}.safetensors" for part in PARTS)
_CONFIG_ENTRY = "vitok_config"  # in the metadata of a safetensors file
_RELEASED_REPOSITORY = "philippehansen/ViTok-v2-"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def load_pretrained(
    location: str | Path,
    *,
    part: Part | None = None,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
) -> Autoencoder:
    """Load an autoencoder from wherever its weights are; in eval mode, on the CPU.

    The config is that of our config.json if there is one, or of a released model's name; else that
    which we note inside the files; else it follows from the shapes of the weights. These do not
    tell tanh latents from LayerNorm; where part is given and the other file is not there, the other
    side's fields have no meaning (see vitok.shapes). A config.json of another format is passed
    over.

    Args:
        location: a folder or `s3://` prefix that holds the weights, a training checkpoint, or the
            `export` of a training run; a released model, as in `350M-f16x64`; or a Hugging Face
            repository, `owner/name` or `owner/name@revision`. A local folder comes before a name.
        part: load the encoder or the decoder alone; the other file's weights are not read, and of a
            released model not downloaded. Of a checkpoint in an object store all is downloaded.
        dtype: of the weights, whatever they are stored in.
        meta: read no weights: the model stays on the meta device once the files are found, and
            their headers agree with its config.

    Raises:
        FileNotFoundError: there are no weights, or they cannot be downloaded.
        ValueError: a file is damaged, or the tensors are not those of the config; missing, surplus
            and mis-shaped ones are listed.
    """
    given = str(location)
    if isinstance(location, str) and "://" not in given and not Path(given).expanduser().exists():
        name, _, revision = given.partition("@")
        released = released_name(name)
        if released and "/" not in name:
            name = _RELEASED_REPOSITORY + released
        if "/" not in name or _shape(name):
            raise _unknown(given)
        if _REPOSITORY.fullmatch(name):
            return _load_repository(name, revision or "main", given, part, dtype, meta)
    if Path(given).is_file():
        raise FileNotFoundError(
            f"{given} is a file; give its folder, {Path(given).parent}, which holds the model"
        )
    return _load_folder(Folder.of(given), part, dtype, meta)


def load_checkpoint(
    folder: Folder,
    config: AutoencoderConfig | None = None,
    *,
    part: Part | None = None,
    dtype: torch.dtype = torch.float32,
    average: bool = True,
    meta: bool = False,
) -> Autoencoder:
    """Load the weights of a training checkpoint, as load_pretrained does.

    Args:
        average: take the moving average of the weights where the training kept one.
        config: of the model; None for that of the run whose folder the checkpoint lies in or,
            without one, for what the shapes of the weights tell.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        if meta:
            (local / CHECKPOINT_METADATA).write_bytes(folder.read_bytes(CHECKPOINT_METADATA))
        else:
            local = folder.download(local)
        shapes = weight_shapes(local)
        if config is None:
            run = Folder(folder.uri.rpartition("/")[0])
            config = _config_of_run(run) or config_of_shapes(shapes, folder.uri)
        with torch.device("meta"):
            model = Autoencoder(config, part)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        found = {name: shapes[name] for name in shapes if part in (None, part_of(name))}
        if complaints := _complaints(expected, found):
            raise ValueError(
                f"{folder.uri} is a checkpoint of another architecture: {_listed(complaints)}"
            )
        if meta:
            return model.eval()
        load_weights(model.to_empty(device="cpu"), local, average=average)
    return model.to(dtype).eval()


def save_pretrained(
    folder: str | Path, config: AutoencoderConfig, weights: dict[str, Tensor]
) -> None:
    """Write weights as the two files of a released model, plus the config.

    Args:
        weights: every parameter of Autoencoder(config) by name; of an encoder or a decoder alone
            there is one file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The files may be moved without the config; shapes alone do not tell all of it.
    metadata = {_CONFIG_ENTRY: json.dumps(to_dict(config))}
    for part in PARTS:
        tensors = {name: x.contiguous() for name, x in weights.items() if part_of(name) == part}
        if tensors:
            save_file(tensors, folder / f"{part}.safetensors", metadata)
    write_config(folder / CONFIG_FILE, config)


def encoder_digest(model: Autoencoder) -> str:
    """Return the sha256 (hex) of the encoder: all that makes its latents, weights as float32.

    It is the same for the whole model and for its encoder alone.
    """
    digest = hashlib.sha256()
    config = model.config
    heads = config.encoder_heads if config.encoder_depth else 0
    digest.update(repr((config.patch_size, config.latent_channels, heads, config.latent)).encode())
    for name, parameter in sorted(model.named_parameters()):
        if part_of(name) == "encoder":
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(network: nn.Module) -> str:
    """Return the sha256 (hex) of a network's parameters by name, as float32."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_folder(folder: Folder, part: Part | None, dtype: torch.dtype, meta: bool) -> Autoencoder:
    names = set(folder.names())
    if not names & set(WEIGHT_FILES):
        if is_checkpoint(names):
            return load_checkpoint(folder, part=part, dtype=dtype, meta=meta)
        export = folder.child(EXPORT)
        if set(export.names()) & set(WEIGHT_FILES):
            return _load_folder(export, part, dtype, meta)
    for file in _files_of(part):
        if file not in names:
            raise _no_weights(folder, file)
    config = _own_config(folder)
    if config is None:
        headers = [_header(folder, file) for file in sorted(names & set(WEIGHT_FILES))]
        config = _noted_config(headers, folder.uri)
    if config is None:
        shapes = dict(item for header in headers for item in _shapes(header).items())
        config = config_of_shapes(shapes, folder.uri)
    model = _checked_model(config, part, folder, folder.uri)
    if meta:
        return model
    if folder.is_local:
        return _fill(model, part, Path(folder.uri), dtype)
    with tempfile.TemporaryDirectory() as scratch:
        for file in _files_of(part):
            filesystem, path = pyarrow.fs.FileSystem.from_uri(f"{folder.uri}/{file}")
            pyarrow.fs.copy_files(path, f"{scratch}/{file}", source_filesystem=filesystem)
        return _fill(model, part, Path(scratch), dtype)


def _load_repository(
    name: str, revision: str, given: str, part: Part | None, dtype: torch.dtype, meta: bool
) -> Autoencoder:
    wanted = _files_of(part)
    is_released = name.startswith(_RELEASED_REPOSITORY) and released_name(name)
    files = fetch(name, revision, wanted, [] if is_released else [CONFIG_FILE], given=given)
    local = Folder.of(str(files))
    if is_released:
        config: AutoencoderConfig | None = AutoencoderConfig.from_name(name)
    else:
        headers = [_header(local, file) for file in wanted]
        config = _own_config(local) or _noted_config(headers, given)
    if config is None:
        shapes: Shapes = {}
        for file in WEIGHT_FILES:
            if local.exists(file):
                found = _shapes(_header(local, file))
            else:
                found = fetch_shapes(name, files.name, file, given=given)
            shapes = {**shapes, **found}
        config = config_of_shapes(shapes, given)
    model = _checked_model(config, part, local, given)
    return model if meta else _fill(model, part, files, dtype)


def _checked_model(
    config: AutoencoderConfig, part: Part | None, folder: Folder, source: str
) -> Autoencoder:
    """Return the model on the meta device, after a look at the headers of its files.

    Args:
        source: what messages call the folder.
    """
    with torch.device("meta"):
        model = Autoencoder(config, part)
    complaints: list[str] = []
    for file in _files_of(part):
        expected = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if file == f"{part_of(name)}.safetensors"
        }
        complaints += _complaints(expected, _shapes(_header(folder, file, is_whole=True)))
    if complaints:
        raise ValueError(f"{source} does not hold the weights of its config: {_listed(complaints)}")
    return model.eval()


def _fill(model: Autoencoder, part: Part | None, files: Path, dtype: torch.dtype) -> Autoencoder:
    """Fill a model on the meta device from the files in a local folder."""
    weights: dict[str, Tensor] = {}
    for file in _files_of(part):
        try:
            with safe_open(files / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    # A copy: the file may be replaced or deleted while the model is in use.
                    weights[name] = opened.get_tensor(name).to(dtype, copy=True)
        except SafetensorError as error:
            raise ValueError(f"{files / file} is damaged: {error}; copy it again") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _files_of(part: Part | None) -> list[str]:
    return [f"{side}.safetensors" for side in PARTS if part in (None, side)]


def _header(folder: Folder, file: str, *, is_whole: bool = False) -> dict[str, Any]:
    """Return the header of a safetensors file: an entry a tensor, and perhaps metadata.

    Args:
        is_whole: the tensors must be there too.
    """
    filesystem, path = pyarrow.fs.FileSystem.from_uri(f"{folder.uri}/{file}")
    try:
        with filesystem.open_input_file(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(stream.read(length))
            _shapes(entries)  # fails on what is no header
            ends = [x["data_offsets"][1] for name, x in entries.items() if name != "__metadata__"]
            if is_whole and stream.size() != (expected := 8 + length + max(ends, default=0)):
                raise ValueError(f"{stream.size()} bytes where its header speaks of {expected}")
        return entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.uri}/{file} is damaged: {error}; copy it again") from error


def _shapes(header: dict[str, Any]) -> Shapes:
    return {name: tuple(x["shape"]) for name, x in header.items() if name != "__metadata__"}


def _noted_config(headers: list[dict[str, Any]], source: str) -> AutoencoderConfig | None:
    """Read the config that save_pretrained noted in a file; None where there is none."""
    for header in headers:
        text = header.get("__metadata__", {}).get(_CONFIG_ENTRY)
        if text is not None:
            return parse_json(AutoencoderConfig, text, source)
    return None


def _complaints(expected: Shapes, found: Shapes) -> list[str]:
    """Say what is wrong with the tensors of a file, a sentence of each kind in turn."""
    missing = [f"{name} missing" for name in sorted(expected.keys() - found.keys())]
    surplus = [f"{name} not expected" for name in sorted(found.keys() - expected.keys())]
    misshapen = [
        f"{name} has shape {found[name]} where the config says {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    rows = itertools.zip_longest(missing, surplus, misshapen)
    return [complaint for row in rows for complaint in row if complaint]


def _listed(complaints: list[str]) -> str:
    more = f" and {len(complaints) - 10} more" if len(complaints) > 10 else ""
    return "; ".join(complaints[:10]) + more


def _own_config(folder: Folder) -> AutoencoderConfig | None:
    """Read the config.json of save_pretrained; None where there is none, or one of others."""
    fields = _read_json(folder)
    if not _is_config(fields):
        return None
    return parse_config(AutoencoderConfig, fields, f"{folder.uri}/{CONFIG_FILE}")


def _config_of_run(folder: Folder) -> AutoencoderConfig | None:
    """Read the model's config out of that of a training run; None where there is none."""
    fields = _read_json(folder)
    if not isinstance(fields, dict) or "model" not in fields or not _is_config(fields["model"]):
        return None
    return parse_config(AutoencoderConfig, fields["model"], f"{folder.uri}/{CONFIG_FILE}")


def _is_config(fields: Any) -> bool:
    """Whether fields are meant as an AutoencoderConfig, right or wrong."""
    return isinstance(fields, dict) and {"patch_size", "encoder_width"} <= fields.keys()


def _read_json(folder: Folder) -> Any:
    if not folder.exists(CONFIG_FILE):
        return None
    try:
        return json.loads(folder.read_bytes(CONFIG_FILE))
    except ValueError as error:
        raise ValueError(f"{folder.uri}/{CONFIG_FILE} is not JSON: {error}") from error


def _shape(name: str) -> AutoencoderConfig | None:
    """Return the config that a name such as Ld4-L/16x64 means; it has no weights of its own."""
    try:
        return None if released_name(name) else AutoencoderConfig.from_name(name)
    except ValueError:
        return None


def _no_weights(folder: Folder, file: str) -> FileNotFoundError:
    if _config_of_run(folder):
        return FileNotFoundError(
            f"{folder.uri} is a training run without exported weights; give its folder "
            f"{EXPORT}/, which is written when it ends, or one of its checkpoint folders"
        )
    return FileNotFoundError(
        f"{folder.uri} holds no {file}; give the folder of exported weights "
        f"({', '.join(WEIGHT_FILES)}, {CONFIG_FILE}), such as RUN/{EXPORT} of a finished run, or a "
        "checkpoint folder of a run"
    )


def _unknown(given: str) -> FileNotFoundError:
    shape = _shape(given)
    alike = [name for name in RELEASED if AutoencoderConfig.from_name(name) == shape]
    near = alike or difflib.get_close_matches(given, RELEASED, n=1, cutoff=0)
    return FileNotFoundError(
        f"{given!r} is neither a folder nor a model with weights; did you mean {near[0]}? Give a "
        f"released model ({', '.join(RELEASED)}), a Hugging Face repository (owner/name or "
        "owner/name@revision), or a folder or s3:// prefix of weights or of a checkpoint"
    )
