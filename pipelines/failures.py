"""What went wrong, out of whatever a distributed system wrapped around it."""


def root_cause(error: BaseException) -> str:
    """Return the message of the exception that started it, in one line where it is one."""
    failures = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    if failures:
        return root_cause(failures[min(failures)])
    for name in ("controller_failure", "cause", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    return str(error).strip() or type(error).__name__
