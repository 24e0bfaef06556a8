"""A Prefect process worker that does not need Prefect."""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know this name; importing typing for it costs as much as argparse
if TYPE_CHECKING:
    from typing import Any

    from procworker.configuration import BaseJobConfiguration, BaseVariables, BaseWorkerResult
    from procworker.process import ProcessWorker, ProcessWorkerResult
    from procworker.process_job import ProcessJobConfiguration, ProcessVariables
    from procworker.settings import Settings
    from procworker.worker import BaseWorker

__version__ = "0.1.0"

__all__ = [
    "BaseJobConfiguration",
    "BaseVariables",
    "BaseWorker",
    "BaseWorkerResult",
    "ProcessJobConfiguration",
    "ProcessVariables",
    "ProcessWorker",
    "ProcessWorkerResult",
    "Settings",
]

_HOMES = {
    "configuration": ("BaseJobConfiguration", "BaseVariables", "BaseWorkerResult"),
    "process": ("ProcessWorker", "ProcessWorkerResult"),
    "process_job": ("ProcessJobConfiguration", "ProcessVariables"),
    "settings": ("Settings",),
    "worker": ("BaseWorker",),
}


def __getattr__(name: str) -> Any:
    # `procworker --version` must not pay for pydantic and httpx.
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"procworker.{module}"), name)
    raise AttributeError(f"module 'procworker' has no attribute {name!r}")
