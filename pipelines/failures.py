"""What went wrong, out of whatever a distributed system wrapped around it."""

from collections.abc import Iterator

# Of torch and of Ray, which this module need not import; of Python.
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
# torch's allocator on CPUs raises a RuntimeError.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class Unrecoverable(RuntimeError):
    """Trying again from the same checkpoint would end in the same way; raised by all workers."""


class Diverged(Unrecoverable):
    """A gradient was not finite."""


class OutOfMemory(RuntimeError):
    """A worker asked its device or its node for more memory than there is."""


class Preempted(Exception):
    """Somebody outside asked the work to stop; it can be gone on with."""


def root_cause(error: BaseException) -> str:
    """Return the message of the exception that started it, in one line where it is one."""
    *_, error = _wrapped(error)
    # Ray Data adds advice on its retries, which are not what the reader has to do.
    message = str(error).split("\nFailed to apply UDF transform")[0]
    return message.strip() or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a worker ran out of memory, on its device or on its node.

    A process that the kernel kills leaves no more than a lost worker behind, and is not known.
    """
    failures = getattr(error, "worker_failures", None) or {0: error}
    causes = [cause for failure in failures.values() for cause in _wrapped(failure)]
    return any(
        type(cause).__name__ in _OUT_OF_MEMORY or _CPU_OUT_OF_MEMORY in str(cause)
        for cause in causes
    )


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it wraps, down to the one that started it."""
    yield error
    failures = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    inner = [failures[min(failures)]] if failures else []
    inner += [getattr(error, name, None) for name in ("controller_failure", "cause", "_base_exc")]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _wrapped(cause)
            return
