"""Files of Hugging Face repositories: from the cache of this machine, or downloaded once."""

import sys
from collections.abc import Sequence
from pathlib import Path


def fetch(
    repository: str,
    revision: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    given: str,
) -> Path:
    """Return the folder that holds files of one commit of a repository; its name is the commit.

    What is not in the cache is downloaded, and one line on stderr says what, and from where.
    HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_TOKEN mean what they mean to huggingface_hub.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit. A branch that is in the cache is the commit it was then.
        optional: may be missing from the folder: where the repository lacks them, or where it
            cannot be asked although all required files are in the cache.
        given: what the user wrote, for the messages.

    Raises:
        FileNotFoundError: a required file is not to be had; says why, and what to do.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        is_offline_mode,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import RemoteEntryNotFoundError

    cached: dict[str, Path] = {}
    for name in (*required, *optional):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            cached[name] = Path(path)
    suffices = set(required) <= cached.keys()
    folder = next(path.parent for path in cached.values()) if cached else None
    if folder is not None and suffices and is_offline_mode():
        return folder
    if folder is not None:
        # The branch may have moved on since: never mix two commits.
        revision = folder.name
    there: list[str] = []
    for name in (*required, *optional):
        if name in cached:
            continue
        # Without a network, hf_hub_download would try for half a minute before it says so.
        try:
            get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
        except _errors() as error:
            absent = isinstance(error, RemoteEntryNotFoundError)
            if name in optional and (absent or suffices):
                continue
            raise _unavailable(repository, revision, name, given, error) from error
        there.append(name)
    if there:
        at = "" if revision == "main" else f" at {revision}"
        print(f"downloading {' and '.join(there)} from {_page(repository)}{at}", file=sys.stderr)
    for name in there:
        try:
            folder = Path(hf_hub_download(repository, name, revision=revision)).parent
        except _errors() as error:
            raise _unavailable(repository, revision, name, given, error) from error
        revision = folder.name
    assert folder is not None
    return folder


def fetch_shapes(
    repository: str, revision: str, name: str, *, given: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors, by downloading its header alone.

    Returns:
        shapes by name; empty where the repository has no such file.

    Raises:
        FileNotFoundError: the repository cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        header = HfApi().parse_safetensors_file_metadata(repository, name, revision=revision)
    except _errors() as error:
        if isinstance(error, RemoteEntryNotFoundError):
            return {}
        raise _unavailable(repository, revision, name, given, error) from error
    return {tensor: tuple(info.shape) for tensor, info in header.tensors.items()}


def _errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises where a file is not to be had."""
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        SafetensorsParsingError,
        XetDownloadError,
    )

    return (OSError, HTTPError, HFValidationError, SafetensorsParsingError, XetDownloadError)


def _unavailable(
    repository: str, revision: str, name: str, given: str, error: Exception
) -> FileNotFoundError:
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OfflineModeIsEnabled):
        reason = "it is not in the cache, and HF_HUB_OFFLINE is set"
    elif isinstance(error, GatedRepoError):
        reason = "accept its terms on that page and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such repository, or only for those who log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"it has no revision {revision}"
    elif isinstance(error, RemoteEntryNotFoundError):
        reason = "it has no such file"
    at = "" if revision == "main" else f" --revision {revision}"
    return FileNotFoundError(
        f"cannot get {name} of {given} from {_page(repository)} ({reason}), and there is no folder "
        f"of this name; download it where that works with "
        f"`hf download {repository}{at} --local-dir FOLDER` and give FOLDER instead of {given} "
        "(on the command line --model FOLDER)"
    )


def _page(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"
