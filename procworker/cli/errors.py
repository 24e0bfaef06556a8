"""Turn an exception into one line for a person and an exit code."""

from __future__ import annotations

import traceback

from procworker.errors import (
    ApiError,
    ConfigurationError,
    ObjectNotFound,
    ProcworkerError,
    Unauthorized,
    Unreachable,
    single,
)

FAILED, USAGE, UNREACHABLE, NOTHING, UNKILLED = 1, 2, 3, 4, 5


def sentence(error: BaseException) -> str:
    """Say what to change. What we did not foresee is our bug: its traceback comes with it. SystemExit passes."""
    error = single(error)
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, Unauthorized) and error.status_code == 403:
        return f"the server forbids this, check the name and what your credentials may do: {error}"
    if isinstance(error, Unauthorized):
        return f"the server refuses the credentials, check PREFECT_API_KEY or PREFECT_API_AUTH_STRING: {error}"
    if isinstance(error, Unreachable):
        return f"the Prefect API cannot be reached, check PREFECT_API_URL (most end in /api) and the server: {error}"
    if isinstance(error, ObjectNotFound):
        return f"the server has no such thing, check PREFECT_API_URL (most end in /api): {error}"
    if isinstance(error, ApiError):
        return f"the server refuses: {error}"
    if isinstance(error, ProcworkerError):
        return str(error)
    return "this is a bug in procworker, please report it:\n" + "".join(traceback.format_exception(error))


def exit_code(error: BaseException) -> int:
    error = single(error)
    if isinstance(error, Unreachable):
        return UNREACHABLE
    return USAGE if isinstance(error, ConfigurationError | ApiError) else FAILED
