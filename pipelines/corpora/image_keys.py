"""Keys that a WebDataset can have, made of names that may hold anything.

What a key cannot hold is replaced, and a digest of the original added, so that what is changed
stays recognisable and different names keep different keys.
"""

import hashlib
import re

_MAX_LETTERS = 120
# A key is a relative path, and ends at the first dot of its last part.
_NOT_IN_A_FOLDER = re.compile(r"[\x00-\x1f\x7f/\\\ud800-\udfff]|^\.+")
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f/\\\ud800-\udfff.]")


class Keys:
    """The keys of one folder, made different from each other in the order in which they come."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def claim(self, wanted: str, original: str) -> str:
        """Return the key that is wanted, or where that is taken, with a digest of the original."""
        key, attempt = wanted, 0
        while key in self._taken:
            key = f"{wanted}-{_digest(f'{original} {attempt}')}"
            attempt += 1
        self._taken.add(key)
        return key


def folder_key(name: str) -> str:
    """Return what stands for a folder in a key."""
    return _replace(name, _NOT_IN_A_FOLDER)


def sample_key(name: str) -> str:
    """Return what stands for a name without its extension in a key, as its last part."""
    return _replace(name, _NOT_IN_A_NAME)


def _replace(name: str, forbidden: re.Pattern[str]) -> str:
    replaced = forbidden.sub("_", name)[:_MAX_LETTERS]
    if replaced.startswith("__"):  # which is about the shard, not a sample
        replaced = replaced.lstrip("_")
    return replaced if replaced == name and name else f"{replaced}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
