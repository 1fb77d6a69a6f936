"""What went wrong, out of whatever a distributed system wrapped around it."""


class Unrecoverable(Exception):
    """Trying again from the same checkpoint would end in the same way; raised by all workers."""


class Preempted(Exception):
    """Somebody outside asked the work to stop; it can be gone on with."""


def root_cause(error: BaseException) -> str:
    """Return the message of the exception that started it, in one line where it is one."""
    failures = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    if failures:
        return root_cause(failures[min(failures)])
    for name in ("controller_failure", "cause", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    # Ray Data adds advice on its retries, which are not what the reader has to do.
    message = str(error).split("\nFailed to apply UDF transform")[0]
    return message.strip() or type(error).__name__
