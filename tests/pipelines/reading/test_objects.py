import io
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import (
    Manifest,
    build_manifest,
    expand_shards,
    index_shard,
    read_samples,
    write_shards,
)
from pipelines.reading import objects, stores
from pipelines.reading.objects import (
    ObjectChanged,
    RemoteObject,
    StoreUnavailable,
    list_objects,
    retry_counts,
)
from pipelines.reading.shards import open_ranges, open_shard, shard_size
from tests.pipelines.faulty_store import FAULTS, FaultyProxy, Origin, in_turn, rarely, running

BLOB = random.Random(0).randbytes(400_000)
S3_FAULTS = list(FAULTS)
# A code beside the status is a matter of S3.
WEB_FAULTS = [fault for fault in FAULTS if fault != "400 RequestTimeout"]


class Store:
    """A store behind a proxy that spoils its answers; base is the URI of its files."""

    def __init__(self, base: str, proxy: FaultyProxy, put: Callable[[str, bytes], None]) -> None:
        self.base = base
        self.proxy = proxy
        self.put = put

    def uri(self, name: str) -> str:
        return f"{self.base}/{name}"

    @property
    def faults(self) -> list[str]:
        """What may go wrong here."""
        return S3_FAULTS if self.base.startswith("s3://") else WEB_FAULTS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rng = np.random.default_rng(0)

    def encode(index: int) -> bytes:
        height, width = rng.integers(40, 160, 2)
        stream = io.BytesIO()
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, format="JPEG")
        return stream.getvalue()

    samples = ({"__key__": f"{i:04d}", "jpg": encode(i), "cls": i} for i in range(120))
    return write_shards(samples, tmp_path_factory.mktemp("shards"), "train", 20)


@pytest.fixture(scope="module")
def s3_server(shards: list[str]) -> Iterator[tuple[FaultyProxy, Callable[[str, bytes], None]]]:
    moto_server = pytest.importorskip("moto.server", reason="needs moto[server], see extra dev")
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
            patched.delenv(name, raising=False)
        patched.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.session.Session().client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="corpus")

        def put(name: str, data: bytes) -> None:
            client.put_object(Bucket="corpus", Key=name, Body=data)

        put("blob", BLOB)
        for path in shards:
            put(f"set/{Path(path).name}", Path(path).read_bytes())
        proxy = FaultyProxy(f"http://{host}:{port}")
        with running(proxy):
            patched.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield proxy, put
    server.stop()


@pytest.fixture(scope="module")
def http_server(shards: list[str]) -> Iterator[tuple[FaultyProxy, Origin]]:
    origin = Origin()
    origin.files["/blob"] = BLOB
    origin.files |= {f"/set/{Path(path).name}": Path(path).read_bytes() for path in shards}
    proxy = FaultyProxy(origin.url)
    with running(origin), running(proxy):
        yield proxy, origin


@pytest.fixture
def s3(s3_server: tuple[FaultyProxy, Callable[[str, bytes], None]]) -> Store:
    proxy, put = s3_server
    proxy.reset()
    return Store("s3://corpus", proxy, put)


@pytest.fixture
def origin(http_server: tuple[FaultyProxy, Origin]) -> Origin:
    http_server[1].reset()
    return http_server[1]


@pytest.fixture
def web(http_server: tuple[FaultyProxy, Origin], origin: Origin) -> Store:
    proxy, _ = http_server
    proxy.reset()
    return Store(proxy.url, proxy, lambda name, data: origin.files.update({f"/{name}": data}))


@pytest.fixture(params=["s3", "web"])
def store(request: pytest.FixtureRequest) -> Store:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before repetitions, which are not made; each test counts from zero."""
    slept: list[float] = []
    monkeypatch.setattr(objects, "sleep", slept.append)
    monkeypatch.setattr(objects, "_retries", Counter())
    return slept


@pytest.fixture
def new_client() -> Iterator[None]:
    """A client of this test's own: it keeps the settings that it is made with."""
    stores._s3_client.cache_clear()
    yield
    stores._s3_client.cache_clear()


def test_thousands_of_ranges_from_a_faulty_store_equal_the_source(
    store: Store, pauses: list[float]
) -> None:
    store.proxy.reset(rarely(0.1, 1, store.faults))
    rng = random.Random(2)
    blob = RemoteObject(store.uri("blob"), len(BLOB))
    num_ranges = 800 if store.base.startswith("s3") else 2500
    for _ in range(num_ranges):
        start = rng.randrange(len(BLOB))
        num_bytes = min(rng.randrange(1, 40_000), len(BLOB) - start)
        assert blob.read_range(start, num_bytes) == BLOB[start : start + num_bytes]
    assert set(store.proxy.injected) == set(store.faults)
    num_faults = store.proxy.injected.total()
    assert num_faults > 0.08 * num_ranges
    assert retry_counts() == store.proxy.expected_retries()
    assert len(pauses) == num_faults == len(store.proxy.requests) - num_ranges


def test_streams_from_a_faulty_store_equal_the_source(store: Store, pauses: list[float]) -> None:
    store.proxy.reset(rarely(0.4, 3, store.faults))
    rng = random.Random(4)
    for _ in range(80):
        read = []
        with open_shard(store.uri("blob")) as stream:
            while chunk := stream.read(rng.choice([1, 512, 5000, 300_000])):
                read.append(chunk)
        assert b"".join(read) == BLOB
    assert set(store.proxy.injected) == set(store.faults)
    assert retry_counts() == store.proxy.expected_retries()
    assert len(store.proxy.requests) == 80 + len(pauses)


def test_threads_share_a_client_and_read_what_is_there(store: Store) -> None:
    store.proxy.reset(rarely(0.1, 5, store.faults))
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(
            RemoteObject(store.uri("blob"), len(BLOB)).read_range, *zip(*ranges(200), strict=True)
        )
        assert list(read) == [BLOB[start : start + size] for start, size in ranges(200)]
    assert retry_counts() == store.proxy.expected_retries() != {}


def ranges(count: int) -> list[tuple[int, int]]:
    rng = random.Random(6)
    return [(rng.randrange(len(BLOB) - 5000), rng.randrange(1, 5000)) for _ in range(count)]


def assert_same_manifest(manifest: Manifest, local: Manifest) -> None:
    assert manifest.digest == local.digest
    assert manifest.num_bytes_per_shard.tolist() == local.num_bytes_per_shard.tolist()
    order = np.random.default_rng(0).permutation(local.num_samples)
    expected, found = local.records(order), manifest.records(order)
    assert found.key.tolist() == expected.key.tolist()
    assert found.offset.tolist() == expected.offset.tolist()
    for places in np.array_split(np.arange(len(order)), 10):
        assert read_samples(manifest, found.take(places)) == read_samples(
            local, expected.take(places)
        )


def test_a_manifest_over_a_faulty_store_is_that_of_the_local_files(
    s3: Store, web: Store, shards: list[str], tmp_path: Path
) -> None:
    local = build_manifest(shards, tmp_path / "local")
    for store, pattern in ((s3, "set/train-*.tar"), (web, "set/train-{000000..000005}.tar")):
        store.proxy.reset(rarely(0.3, 7, store.faults))
        manifest = build_manifest([store.uri(pattern)], tmp_path / store.base[:2])
        assert manifest.uris == [store.uri(f"set/{Path(path).name}") for path in shards]
        assert_same_manifest(manifest, local)
        assert store.proxy.injected.total() > 10
    for path, uri in zip(shards, expand_shards([s3.uri("set/")]), strict=True):
        assert vars(index_shard(uri)).keys() == vars(index_shard(path)).keys()
        assert shard_size(uri) == shard_size(path) == Path(path).stat().st_size
    expected = Counter(s3.proxy.expected_retries()) + Counter(web.proxy.expected_retries())
    assert Counter(retry_counts()) == expected


@pytest.mark.parametrize(
    ("store", "fault"),
    [("s3", fault) for fault in S3_FAULTS] + [("web", fault) for fault in WEB_FAULTS],
    indirect=["store"],
)
def test_what_stays_broken_is_a_named_failure(
    store: Store,
    pauses: list[float],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.proxy.reset(lambda path: fault)
    monkeypatch.setattr(objects, "MAX_PAUSE_S", 5.0)
    uri = store.uri("blob")
    with (
        caplog.at_level(logging.INFO, logger="pipelines.reading.objects"),
        pytest.raises(StoreUnavailable) as failure,
    ):
        RemoteObject(uri, len(BLOB)).read_range(1000, 1)
    sentence = str(failure.value)
    assert sentence.startswith(f"{uri}: bytes 1000-1000 could not be read in 8 attempts over ")
    assert f"the last one: {FAULTS[fault]}" in sentence
    assert "try again when the store is well" in sentence
    assert len(store.proxy.requests) == objects.MAX_ATTEMPTS == 8
    assert retry_counts() == {FAULTS[fault]: 7}
    bounds = [0.25, 0.5, 1, 2, 4, 5, 5]
    assert all(0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len(set(pauses)) == 7
    log = [record for record in caplog.records if record.name == "pipelines.reading.objects"]
    assert [record.levelname for record in log] == ["INFO"] * 2 + ["WARNING"] * 5
    assert "bytes 1000-1000: attempt 1 of 8 failed: " in log[0].getMessage()


def test_a_stream_that_breaks_for_good_names_the_byte_where_it_stood(store: Store) -> None:
    faults = iter([None])
    store.proxy.reset(lambda path: next(faults, "503"))
    with open_shard(store.uri("blob")) as stream:
        assert stream.read(10) == BLOB[:10]
    store.proxy.reset(lambda path: "truncated")
    with (
        open_shard(store.uri("blob")) as stream,
        pytest.raises(StoreUnavailable, match=r"blob: bytes \d{5,}- could not be read in 8 attemp"),
    ):
        stream.read()


def test_attempts_start_anew_when_a_stream_has_come_far_enough(
    web: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(objects, "PROGRESS_BYTES", 10_000)
    web.proxy.reset(in_turn(*["truncated"] * 10))
    monkeypatch.setattr(web.proxy.rng, "random", lambda: 0.1)
    with open_shard(web.uri("blob")) as stream:
        assert stream.read() == BLOB
    assert retry_counts() == {"truncated": 10}


def test_attempts_end_when_their_time_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(objects, "monotonic", lambda: next(clock))
    store.proxy.reset(lambda path: "503")
    with pytest.raises(StoreUnavailable, match=r"in [45] attempts over [34]00 s"):
        RemoteObject(store.uri("blob"), len(BLOB)).read_range(0, 10)


def test_a_store_that_is_not_there_is_a_named_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 is "discard", which nobody runs.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    for uri in ("http://127.0.0.1:9/x.tar", "s3://corpus/x.tar"):
        with pytest.raises(StoreUnavailable, match=rf"{uri}: bytes 0-9 .* the last one: connectio"):
            RemoteObject(uri, 10).read_range(0, 10)
    with pytest.raises(StoreUnavailable, match="s3://corpus/: the list of objects after"):
        list_objects("s3://corpus/", recursive=True)


def test_what_is_missing_or_forbidden_is_said_at_once(s3: Store, web: Store) -> None:
    for uri, store, code in (
        ("s3://corpus/gone.tar", s3, "404 NoSuchKey"),
        ("s3://no-such-bucket/gone.tar", s3, "404 NoSuchBucket"),
        (web.uri("gone.tar"), web, "404 X"),
    ):
        store.proxy.reset()
        sentence = rf"^{uri}: not in the store \({code}\); compare the name with a listing"
        for read in (index_shard, RemoteObject(uri, 10).stream().read1, shard_size):
            with pytest.raises(FileNotFoundError, match=sentence):
                read(uri) if read in (index_shard, shard_size) else read(1)
        assert len(store.proxy.requests) == 3
    for store in (s3, web):
        store.proxy.reset(lambda path: "403")
        uri = store.uri("blob")
        with pytest.raises(
            PermissionError, match=rf"^{uri}: access denied \(403 .*standard AWS ch"
        ):
            RemoteObject(uri, 10).read_range(0, 10)
        assert len(store.proxy.requests) == 1
    s3.proxy.reset()
    with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/a: not in the store"):
        expand_shards(["s3://no-such-bucket/a*.tar"])
    s3.proxy.reset(lambda path: "403")
    with pytest.raises(PermissionError, match="s3://corpus/set/: access denied"):
        expand_shards(["s3://corpus/set/"])
    with pytest.raises(OSError, match=r"s3://UPPER_CASE!/x: .*correct the URI"):
        RemoteObject("s3://UPPER_CASE!/x", 10).read_range(0, 10)
    assert retry_counts() == {}


def test_without_credentials_the_sentence_says_where_they_are_looked_for(
    s3: Store, new_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(PermissionError, match=r"s3://corpus/blob: Unable to locate cred.*standard"):
        RemoteObject(s3.uri("blob"), 10).read_range(0, 10)
    assert s3.proxy.requests == []


@pytest.mark.parametrize("store_listens", [True, False])
def test_an_object_that_is_replaced_while_it_is_read_is_no_mixture(
    store: Store, store_listens: bool
) -> None:
    if not store_listens:
        store.proxy.dropped_headers = {"if-match", "if-range"}
    new = BLOB[::-1]
    store.put("replaced", BLOB)
    uri = store.uri("replaced")
    replaced = RemoteObject(uri, len(BLOB))
    assert replaced.read_range(5, 5) == BLOB[5:10]
    store.put("replaced", new)
    with pytest.raises(ObjectChanged, match=f"^{uri}: replaced while it was read .*index the sha"):
        replaced.read_range(5, 5)
    assert RemoteObject(uri, len(new)).read_range(5, 5) == new[5:10]

    store.put("replaced", BLOB)

    def replace_and_truncate(path: str) -> str | None:
        if len(store.proxy.requests) == num_requests:
            return "truncated"
        store.put("replaced", new)
        return None

    num_requests = len(store.proxy.requests)
    store.proxy.schedule = replace_and_truncate
    read = b""
    with (
        open_shard(uri) as stream,
        pytest.raises(ObjectChanged, match="replaced while it was read"),
    ):
        while True:
            read += stream.read1(1000)
    assert 0 < len(read) < len(BLOB) and BLOB.startswith(read)


def test_another_etag_of_the_same_bytes_is_refused_too(store: Store) -> None:
    blob = RemoteObject(store.uri("blob"), len(BLOB))
    blob.read_range(0, 10)
    store.proxy.reset(lambda path: "another etag")
    with pytest.raises(ObjectChanged, match='now "another", before "'):
        blob.read_range(0, 10)
    store.proxy.reset(lambda path: "412")
    with pytest.raises(ObjectChanged, match=r"blob: replaced while it was read \(412"):
        blob.read_range(0, 10)


@pytest.mark.parametrize("etag", [None, 'W/"{}"'])
def test_replacement_is_seen_by_weak_etags_and_by_length(
    web: Store, origin: Origin, etag: str | None
) -> None:
    origin.etag = etag
    web.put("weak", BLOB)
    weak = RemoteObject(web.uri("weak"))
    with weak.stream() as stream:
        assert stream.read() == BLOB
    assert weak.read_range(7, 3) == BLOB[7:10]
    web.put("weak", BLOB[1:] + (b"" if etag is None else b"x"))
    with pytest.raises(ObjectChanged, match="bytes long" if etag is None else "now W/"):
        weak.read_range(7, 3)


def test_a_shard_of_another_length_than_the_manifest_says_is_a_named_failure(
    store: Store, shards: list[str], tmp_path: Path
) -> None:
    content = Path(shards[0]).read_bytes()
    store.put("short/s.tar", content)
    manifest = build_manifest([store.uri("short/s.tar")], tmp_path / "m")
    records = manifest.records(np.arange(20))
    for other in (content[:-512], content[: int(records.offset[9])], content + bytes(512), b""):
        store.put("short/s.tar", other)
        store.proxy.reset()
        with pytest.raises(ObjectChanged, match=r"s.tar: .*index the shards anew"):
            read_samples(manifest, records)
        assert len(store.proxy.requests) == 1
    assert shard_size(store.uri("short/s.tar")) == 0
    with pytest.raises(ValueError, match=r"s.tar: not a readable tar archive \(empty file"):
        index_shard(store.uri("short/s.tar"))
    with (
        open_ranges(store.uri("blob"), len(BLOB)) as read,
        pytest.raises(OSError, match="blob: 11 bytes from byte 399990 are asked for"),
    ):
        read(len(BLOB) - 10, 11)


def test_a_server_that_ignores_ranges_serves_streams_and_no_ranges(
    web: Store, origin: Origin, pauses: list[float]
) -> None:
    origin.knows_ranges = False
    web.proxy.reset(in_turn("truncated", "503", "reset", "truncated", None))
    with open_shard(web.uri("blob")) as stream:
        assert stream.read() == BLOB
    assert len(pauses) == 4
    with pytest.raises(OSError, match="blob: the server sends the whole shard where a range"):
        RemoteObject(web.uri("blob"), len(BLOB)).read_range(10, 10)
    assert len(pauses) == 4


def test_redirects_are_followed_a_few_times(web: Store, origin: Origin) -> None:
    origin.redirects = {"/a": "/b", "/b": f"{web.proxy.url}/blob", "/loop": "/loop"}
    assert RemoteObject(web.uri("a"), len(BLOB)).read_range(99, 100) == BLOB[99:199]
    assert [request[0] for request in web.proxy.requests] == ["/a", "/b", "/blob"]
    with pytest.raises(OSError, match=r"/loop: more than 5 redirects"):
        RemoteObject(web.uri("loop"), 10).read_range(0, 10)
    origin.redirects = {"/a": "file:///etc/passwd"}
    with pytest.raises(OSError, match=r"/a: no URL that can be read"):
        RemoteObject(web.uri("a"), 10).read_range(0, 10)


def test_bytes_behind_the_promised_ones_are_not_taken(store: Store) -> None:
    store.proxy.reset(lambda path: "surplus" if len(store.proxy.requests) % 2 else None)
    blob = RemoteObject(store.uri("blob"), len(BLOB))
    for start, size in ranges(50):
        assert blob.read_range(start, size) == BLOB[start : start + size]


def test_bytes_that_stall_or_trickle_are_asked_for_again(
    store: Store, new_client: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "READ_TIMEOUT_S", 0.5)
    store.proxy.reset(in_turn("stalled", "stalled"))
    blob = RemoteObject(store.uri("blob"), len(BLOB))
    assert blob.read_range(0, 100_000) == BLOB[:100_000]
    assert retry_counts() == {"timeout": 2}

    # From here a clock that goes on by a second whenever bytes come in.
    monkeypatch.setattr(stores, "READ_TIMEOUT_S", 20.0)
    clock = iter(np.arange(0, 1e6, 0.5).tolist())
    monkeypatch.setattr(stores, "monotonic", lambda: next(clock))
    store.proxy.reset(in_turn("trickled", "trickled"))
    assert blob.read_range(0, 100_000) == BLOB[:100_000]
    assert retry_counts() == {"timeout": 4}
    starts = [headers["range"] for _, headers in store.proxy.requests]
    assert len(set(starts)) == 3 and starts[0] == "bytes=0-99999"


def test_objects_are_listed_as_paths_are(s3: Store, tmp_path: Path) -> None:
    names = ["b-1.tar", "b-0.tar", "a.tar", "notes.txt", "deep/c.tar", "deep/er/d.tar", "b-10.tar"]
    for name in names:
        s3.put(f"list/{name}", b"x")
        (tmp_path / "list" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "list" / name).touch()
    s3.proxy.extra_query = "&max-keys=2"
    for pattern in (
        "",
        "*.tar",
        "b-*.tar",
        "b-?.tar",
        "*/*.tar",
        "**/*.tar",
        "[ab]*.tar",
        "d*/c.*",
    ):
        local = expand_shards([f"{tmp_path}/list/{pattern}"])
        expected = [f"s3://corpus/{Path(path).relative_to(tmp_path)}" for path in local]
        s3.proxy.reset(rarely(0.3, 8, s3.faults))
        s3.proxy.extra_query = "&max-keys=2"
        assert expand_shards([f"s3://corpus/list/{pattern}"]) == expected
        assert len(s3.proxy.requests) > 2
    s3.proxy.reset()
    both = ["s3://corpus/list/a.tar", "s3://corpus/list/deep/c.tar"]
    assert expand_shards(["s3://corpus/list/{a,deep/*}.tar"]) == both
    assert [path for path, _ in s3.proxy.requests if "prefix=list%2Fdeep%2F" in path]
    assert expand_shards(["s3://corpus/list/a.tar", "s3://corpus/list/{*,a}.tar"])[0] == both[0]
    for pattern in ("s3://corpus/list/x*.tar", "s3://corpus/nothing/", "s3://corpus"):
        with pytest.raises(FileNotFoundError, match=f"^{pattern.replace('*', '.')}: no shard mat"):
            expand_shards([pattern])


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_store_at_an_endpoint_has_its_buckets_in_the_path(
    s3: Store, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, s3.proxy.url.replace("127.0.0.1", "localhost"))
    assert RemoteObject(s3.uri("blob")).read_range(0, 10) == BLOB[:10]
    [(path, headers)] = s3.proxy.requests
    assert path.startswith("/corpus/blob") and headers["host"].startswith("localhost:")


def test_a_process_has_one_client_and_none_of_its_parent(
    s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    RemoteObject(s3.uri("blob")).read_range(0, 10)
    mine = stores._s3_client(*stores._client_key())
    num_clients = stores._s3_client.cache_info().currsize
    RemoteObject(s3.uri("blob")).read_range(0, 10)
    assert stores._s3_client.cache_info().currsize == num_clients
    assert stores._s3_client(*stores._client_key()) is mine
    assert stores._http_pool(os.getpid()) is stores._http_pool(os.getpid())
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert stores._s3_client(*stores._client_key()) is not mine
