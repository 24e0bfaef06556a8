"""The exception family, named by what the caller can do.

ProcworkerError
├── ConfigurationError           change the setting, template or argument that the message names
├── SpawnError                   the command could not be started; the message says why
├── ApiError
│   ├── Unreachable              try again later: no answer, a broken answer, 408, 429, 5xx
│   ├── Unauthorized             401 or 403: change the credentials
│   └── Rejected                 trying again cannot help
│       └── ObjectNotFound       404: the thing is gone
└── InfrastructureError
    ├── InfrastructureNotFound       nothing with that identifier exists any more
    └── InfrastructureNotAvailable   it exists, but cannot be reached from this host
"""

from __future__ import annotations


class ProcworkerError(Exception):
    """Base of everything that procworker raises on purpose."""


class ConfigurationError(ProcworkerError, ValueError):
    """A setting, template or argument is wrong; the message says what to change."""


class SpawnError(ProcworkerError):
    """A command could not be started."""


class ApiError(ProcworkerError):
    """A call to the Prefect API did not succeed; `status_code` is None when no answer came.

    `retry_after` is how many seconds the server wants to be left alone, if it said so.
    """

    retry_after: float | None = None

    def __init__(self, message: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


class Unreachable(ApiError):
    """No usable answer; the same call may succeed later."""


class Unauthorized(ApiError):
    """The server refuses the credentials."""


class Rejected(ApiError):
    """The server understood and refuses; the same call will be refused again."""


class ObjectNotFound(Rejected):
    """The thing asked for does not exist, or the server has no such route."""


class InfrastructureError(ProcworkerError):
    """Infrastructure could not be stopped."""


class InfrastructureNotFound(InfrastructureError):
    """Nothing with this identifier exists any more."""


class InfrastructureNotAvailable(InfrastructureError):
    """The infrastructure exists, but not where this worker can reach it."""


def single(error: BaseException) -> BaseException:
    """Unwrap exception groups that hold one exception, as task groups make them."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return single(inner[0]) if len(inner) == 1 else error
