import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import Manifest, build_manifest, read_samples, write_shards
from pipelines.mixture import Corpus, Source
from pipelines.order import MIXTURE_BLOCK
from pipelines.plan import DataConfig

SIZES = {"large": 300, "small": 40, "tiny": 7}
WEIGHTS = {"large": 4.0, "small": 3.0, "tiny": 1.0}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    folder = tmp_path_factory.mktemp("mixture")
    found = []
    for number, (name, size) in enumerate(SIZES.items()):
        samples = []
        for i in range(size):
            stream = io.BytesIO()
            Image.new("RGB", (8 + i % 5, 9), (i % 256, number, 0)).save(stream, "png")
            samples.append({"__key__": f"{name}-{i:03d}", "png": stream.getvalue(), "cls": i})
        write_shards(samples, folder / name, "train", samples_per_shard=64)
        build_manifest([str(folder / name)], folder / f"manifest-{name}")
        found.append(
            Source(name=name, manifest=str(folder / f"manifest-{name}"), weight=WEIGHTS[name])
        )
    return tuple(found)


@pytest.fixture(scope="module")
def corpus(sources: tuple[Source, ...]) -> Corpus:
    return Corpus.mix(sources)


def test_samples_are_numbered_through_all_sources(corpus: Corpus) -> None:
    assert corpus.num_samples == sum(SIZES.values())
    ids = np.random.default_rng(0).permutation(corpus.num_samples)
    records = corpus.records(ids)
    keys = [f"{name}-{i:03d}" for name, size in SIZES.items() for i in range(size)]
    assert records.key.tolist() == [keys[i] for i in ids]
    assert records.sample_id.tolist() == ids.tolist()
    for shard, key in zip(records.shard.tolist(), records.key.tolist(), strict=True):
        assert Path(corpus.uri(shard)).parent.name == key.split("-")[0]


def test_images_of_all_sources_are_read_in_the_order_asked_for(corpus: Corpus) -> None:
    ids = np.random.default_rng(1).permutation(corpus.num_samples)[:100]
    records = corpus.records(ids)
    images = corpus.read(records)
    alone: dict[str, bytes] = {}
    for manifest in corpus.manifests:
        whole = manifest.records(np.arange(manifest.num_samples))
        alone |= zip(whole.key.tolist(), read_samples(manifest, whole), strict=True)
    assert images == [alone[key] for key in records.key.tolist()]
    assert len(set(images)) > 50


def test_a_stream_holds_the_weights_exactly_and_every_source_in_whole_epochs(
    corpus: Corpus,
) -> None:
    epochs, ids = corpus.order(0, 2 * MIXTURE_BLOCK, chunk_samples=4, seed=3)
    bounds = corpus.first_sample
    source = np.searchsorted(bounds, ids, side="right") - 1
    for block in source.reshape(2, MIXTURE_BLOCK):
        assert np.bincount(block).tolist() == [2048, 1536, 512]
    for number, size in enumerate(SIZES.values()):
        mine, mine_epochs = ids[source == number] - bounds[number], epochs[source == number]
        counts = Counter(zip(mine_epochs.tolist(), mine.tolist(), strict=True))
        assert set(counts.values()) == {1}
        for epoch in range(int(mine_epochs.max())):
            assert sorted(mine[mine_epochs == epoch].tolist()) == list(range(size))
        assert corpus.epochs(2 * MIXTURE_BLOCK)[list(SIZES)[number]] == len(mine) / size


def test_an_order_is_found_at_any_place(corpus: Corpus) -> None:
    epochs, ids = corpus.order(0, 6000, chunk_samples=4, seed=3)
    for start, count in ((0, 1), (4090, 20), (5000, 1000)):
        part = corpus.order(start, count, chunk_samples=4, seed=3)
        assert np.array_equal(part[0], epochs[start : start + count])
        assert np.array_equal(part[1], ids[start : start + count])


def test_the_digest_follows_manifests_and_weights(sources: tuple[Source, ...]) -> None:
    digest = Corpus.mix(sources).digest
    assert Corpus.mix(sources).digest == digest
    renamed = tuple(replace(source, name=source.name * 2) for source in sources)
    assert Corpus.mix(renamed).digest == digest, "a name is for logs"
    heavier = (*sources[:2], replace(sources[2], weight=1.5))
    assert Corpus.mix(heavier).digest != digest
    assert Corpus.mix(sources[:2]).digest != digest
    manifest = Manifest.load(sources[0].manifest)
    assert Corpus.of(manifest).digest == manifest.digest


def test_bad_mixtures_are_refused(sources: tuple[Source, ...]) -> None:
    with pytest.raises(ValueError, match="the sources large, large need different names"):
        Corpus.mix([sources[0], sources[0]])
    with pytest.raises(ValueError, match=r"weight=0 of large must be positive; leave it out"):
        replace(sources[0], weight=0)
    with pytest.raises(ValueError, match="name='a/b' of a source must be a plain name"):
        replace(sources[0], name="a/b")
    with pytest.raises(ValueError, match="manifest='m' and sources are both given"):
        DataConfig(manifest="m", sources=sources)
