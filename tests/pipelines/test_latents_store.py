"""A latent cache in an object store that fails."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import latents as latents_module
from pipelines.caching.captions import read_captions
from pipelines.caching.files import create_file, file_names, read_file, remove_file
from pipelines.caching.units import committed_units
from pipelines.caching.verify import verify_here
from pipelines.corpus import build_manifest
from pipelines.latents import LatentCache
from pipelines.reading import objects
from tests.pipelines.captioned_shards import jpeg, write_tar
from tests.pipelines.faulty_store import FAULTS, PUT_FAULTS, FaultyProxy, rarely, running
from tests.pipelines.small_caches import IDENTITY, TEXT, many_units, with_texts, write_small_cache
from vitok.storage import Folder

UNITS = many_units(30, 4)
# What S3 itself cannot answer a range with is left to HTTP servers; see test_objects.
GET_FAULTS = [fault for fault in FAULTS if fault != "shifted range"]


@dataclass
class Store:
    """A bucket `latents` behind a proxy, and the pauses that a client would have made."""

    proxy: FaultyProxy
    client: Any

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return every object below a prefix, past the proxy."""
        found = self.client.list_objects_v2(Bucket="latents", Prefix=prefix)["Contents"]
        return {
            entry["Key"].removeprefix(prefix): self.client.get_object(
                Bucket="latents", Key=entry["Key"]
            )["Body"].read()
            for entry in found
        }


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server], see extra dev")
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.session.Session().client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="latents")  # a new server knows what an old one held
    proxy = FaultyProxy(f"http://{host}:{port}")
    monkeypatch.setattr(objects, "sleep", lambda seconds: None)
    monkeypatch.setattr(objects, "_retries", Counter())
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield Store(proxy, client)
    server.stop()


def test_cache_in_a_failing_store_equals_that_on_a_disk(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "cache"
    identity = replace(IDENTITY, text=TEXT)
    units = {name: with_texts(rows, seed=i) for i, (name, rows) in enumerate(UNITS.items())}
    write_small_cache(local, units, identity)
    store.proxy.schedule = rarely(0.15, 1, GET_FAULTS)
    store.proxy.put_schedule = rarely(0.3, 2, PUT_FAULTS)
    write_small_cache("s3://latents/texts", units, identity)
    expected = {str(f.relative_to(local)): f.read_bytes() for f in local.rglob("*") if f.is_file()}
    assert store.contents("texts/") == expected
    folder = Folder("s3://latents/texts")
    assert committed_units(folder) == set(UNITS)

    latents_module._load_table.cache_clear()
    far, near = LatentCache("s3://latents/texts"), LatentCache(str(local))
    order = torch.randperm(len(near), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), 40):
        batch = order[start : start + 40]
        for a, b in zip(far.__getitems__(batch), near.__getitems__(batch), strict=True):
            assert (a.key, a.grid, a.label) == (b.key, b.grid, b.label)
            assert torch.equal(a.latent, b.latent)
            assert (a.text is None) == (b.text is None)
            assert a.text is None or torch.equal(a.text, b.text)
    assert verify_here("s3://latents/texts") == verify_here(str(local))
    assert sum(store.proxy.injected.values()) > 40
    assert len(store.proxy.injected) >= 7, "faults of many kinds"
    assert objects.retry_counts() == store.proxy.expected_retries()


def test_captions_in_a_failing_store_are_those_on_a_disk(store: Store, tmp_path: Path) -> None:
    members = [
        (f"k{i:03d}.{suffix}", data)
        for i in range(200)
        for suffix, data in (("jpg", jpeg(i)), ("txt", f"caption {i}".encode()))
    ]
    shard = Path(write_tar(tmp_path / "shard.tar", members))
    store.client.put_object(Bucket="latents", Key="shard.tar", Body=shard.read_bytes())
    source = build_manifest(["s3://latents/shard.tar"], tmp_path / "manifest")
    store.proxy.reset()
    store.proxy.schedule = rarely(0.5, 3, GET_FAULTS)
    for start, stop in ((0, 200), (50, 60), (199, 200)):
        captions, bad = read_captions(source, 0, start, stop)
        assert (captions, bad) == ([f"caption {i}" for i in range(start, stop)], {})
    assert sum(store.proxy.injected.values()) > 0
    assert len(store.proxy.requests) == 3 + sum(store.proxy.injected.values()), "few and large"


def test_only_ranges_of_units_are_fetched(store: Store) -> None:
    write_small_cache("s3://latents/cache", UNITS)
    latents_module._load_table.cache_clear()
    cache = LatentCache("s3://latents/cache")
    store.proxy.reset()
    cache.__getitems__([5, 6, 41])
    units = [(path, head["range"]) for path, head in store.proxy.requests if "/units/" in path]
    assert len(units) == len(store.proxy.requests) == 4, "two tables, two runs of neighbours"
    contents = store.contents("cache/units/")
    sizes = [len(data) for name, data in contents.items() if name.endswith(".safetensors")]
    for _, wanted in units:
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        assert last - first + 1 < min(sizes)
    store.proxy.reset()
    cache.__getitems__([4, 7])
    assert len(store.proxy.requests) == 1, "a table is fetched once"


def test_object_is_created_once_whatever_becomes_of_the_answers(store: Store) -> None:
    folder = Folder("s3://latents/once")
    faults = iter(["hang up", None])
    store.proxy.put_schedule = lambda path: next(faults, None)
    # The first answer is lost: the object is ours, and the second request finds it there.
    assert not create_file(folder, "a", b"first")
    assert read_file(folder, "a") == b"first"
    assert create_file(folder, "b", b"x")
    assert not create_file(folder, "a", b"second")
    assert read_file(folder, "a") == b"first"
    assert file_names(folder) == ["a", "b"]
    remove_file(folder, "a")
    remove_file(folder, "a")
    assert file_names(folder) == ["b"]


def test_what_cannot_be_read_or_written_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_cache("s3://latents/cache", UNITS)
    latents_module._load_table.cache_clear()
    cache = LatentCache("s3://latents/cache")
    assert len(cache[0].latent) > 0
    name = cache.unit_names[0]
    store.client.delete_object(Bucket="latents", Key=f"cache/units/{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"{name}\.safetensors: not in the store"):
        cache[0]
    assert f"{name}.safetensors is missing" in verify_here("s3://latents/cache").bad[0]
    store.proxy.put_schedule = lambda path: "403"
    with pytest.raises(PermissionError, match=r"s3://latents/new/.*: access denied"):
        write_small_cache("s3://latents/new", UNITS)
    monkeypatch.setattr(objects, "MAX_ATTEMPTS", 3)
    store.proxy.put_schedule = lambda path: "503"
    with pytest.raises(objects.StoreUnavailable, match=r"could not be written in 3 attempts"):
        write_small_cache("s3://latents/newer", UNITS)
    with pytest.raises(FileNotFoundError, match="holds no finished latent cache"):
        LatentCache("s3://latents/newer")
    with pytest.raises(ValueError, match=r"https://x/y: cannot be written; give a local folder"):
        objects.put_object("https://x/y", b"")
