"""Tests without a Prefect server: a scripted Prefect API in memory, and a worker on it.

For pytest, in conftest.py: `pytest_plugins = ["procworker.testing"]` brings the fixtures `prefect_api` and
`process_worker`. Importing this module imports no pytest.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from procworker.testing.api import PrefectApi
    from procworker.testing.beside import Beside, serving
    from procworker.testing.messages import Fault, Request
    from procworker.testing.worker import WorkerBeside

__all__ = ["Beside", "Fault", "PrefectApi", "Request", "WorkerBeside", "serving"]

pytest_plugins = ["procworker.testing.plugin"]
"""Read by pytest, when it is told to load this module as a plugin."""

_HOMES = {
    "api": ("PrefectApi",),
    "beside": ("Beside", "serving"),
    "messages": ("Fault", "Request"),
    "worker": ("WorkerBeside",),
}


def __getattr__(name: str) -> Any:
    # pytest asks this module for hooks and fixtures, of which it has none.
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"procworker.testing.{module}"), name)
    raise AttributeError(f"module 'procworker.testing' has no attribute {name!r}")
