from dataclasses import replace

import pytest

from pipelines.caching.config import LatentCaching
from pipelines.caching.resources import resources_of

GPUS = LatentCaching(num_workers=8, cpus_per_worker=2.0, cpus_per_reader=1.0)
CORES = replace(GPUS, use_gpu=False)


def test_encoders_have_a_gpu_each_or_cores_alone() -> None:
    on_gpus, on_cores = resources_of(GPUS, 1000), resources_of(CORES, 1000)
    assert (on_gpus.num_encoders, on_gpus.encoder_gpus, on_gpus.least_gpus) == (8, 1, 8)
    assert (on_cores.num_encoders, on_cores.encoder_gpus, on_cores.least_gpus) == (8, 0, 0)
    assert replace(on_gpus, encoder_gpus=0) == on_cores


def test_one_reader_fits_beside_all_encoders() -> None:
    # Without it nothing would ever come to the encoders.
    assert resources_of(GPUS, 1000).least_cpus == 8 * 2.0 + 1.0
    few = resources_of(replace(CORES, num_workers=1, cpus_per_reader=0.5), 1000)
    assert few.least_cpus == 2.5


def test_no_more_encoders_than_units_that_are_missing() -> None:
    assert resources_of(GPUS, 3).num_encoders == 3
    assert resources_of(GPUS, 3).least_gpus == 3
    assert resources_of(GPUS, 8) == resources_of(GPUS, 9)


@pytest.mark.parametrize("cores", [0.5, 1.0, 2.0, 7.0])
def test_readers_never_ask_for_what_encoders_ask_for(cores: float) -> None:
    # Ray Data would fuse the two, and every encoder read by itself.
    alike = resources_of(replace(CORES, cpus_per_worker=cores, cpus_per_reader=cores), 10)
    # As Ray counts cores, in ten-thousandths.
    assert round(alike.reader_cpus * 10_000) == round(cores * 10_000) - 1
    assert alike.encoder_cpus == cores
    unlike = resources_of(replace(CORES, cpus_per_worker=cores, cpus_per_reader=0.25), 10)
    assert unlike.reader_cpus == 0.25


def test_writers_have_a_limit_so_that_all_other_cores_are_for_readers() -> None:
    for num_workers in (1, 2, 3, 16):
        found = resources_of(replace(GPUS, num_workers=num_workers), 1000)
        assert found.num_writers == max(2, num_workers)
        assert found.writer_cpus < 1
