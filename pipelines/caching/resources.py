"""What the steps of encoding get of a cluster: cores, GPUs, and how many of each step run."""

from dataclasses import dataclass

from pipelines.caching.config import LatentCaching

# Ray Data fuses steps that ask for the same resources, and then an encoder would read by itself. So
# much less of a core, the least that Ray counts, keeps readers apart from encoders.
_CPU_GRAIN = 1e-4
# Cores of a task that writes: most of its time it waits.
_CPUS_PER_WRITER = 0.25
_MIN_WRITERS = 2


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What Ray sets aside for each reader, encoder and writer.

    Readers are as many as fit beside the others: Ray Data divides what is free among the steps
    whose number of tasks has no limit, and theirs alone has none.

    Attributes:
        num_encoders: actors, each with weights of its own, loaded once.
        encoder_gpus: of each; 0 where they compute on cores.
        num_writers: at most so many at a time.
    """

    reader_cpus: float
    num_encoders: int
    encoder_cpus: float
    encoder_gpus: int
    writer_cpus: float
    num_writers: int

    @property
    def least_cpus(self) -> float:
        """Cores without which nothing moves: all encoders, and one reader that feeds them."""
        return self.num_encoders * self.encoder_cpus + self.reader_cpus

    @property
    def least_gpus(self) -> int:
        """GPUs of all encoders."""
        return self.num_encoders * self.encoder_gpus


def resources_of(settings: LatentCaching, num_units: int) -> Resources:
    """Return what the steps of a job get that has so many units to encode."""
    num_encoders = min(settings.num_workers, num_units)
    reader_cpus = settings.cpus_per_reader
    if reader_cpus == settings.cpus_per_worker:
        reader_cpus -= _CPU_GRAIN
    return Resources(
        reader_cpus=reader_cpus,
        num_encoders=num_encoders,
        encoder_cpus=settings.cpus_per_worker,
        encoder_gpus=1 if settings.use_gpu else 0,
        writer_cpus=_CPUS_PER_WRITER,
        num_writers=max(_MIN_WRITERS, num_encoders),
    )
