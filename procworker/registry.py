"""What a worker type is, and which types are known: defined in this process, or offered by an installed package."""

from __future__ import annotations

import builtins
import logging
from importlib.metadata import entry_points
from typing import Any, ClassVar

from pydantic import BaseModel

from procworker.configuration import BaseJobConfiguration, default_template

logger = logging.getLogger(__name__)

ENTRY_POINTS = "procworker.workers"


class WorkerType:
    """The part of a worker that belongs to its type; a subclass with a `type` of its own is registered under it."""

    type: str
    job_configuration: Any = BaseJobConfiguration
    job_configuration_variables: Any = None

    _documentation_url = ""
    _logo_url = ""
    _description = ""
    _display_name = ""

    _known: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(cls.__dict__.get("type"), str):
            WorkerType._known[cls.type] = cls

    @classmethod
    def get_documentation_url(cls) -> str:
        return cls._documentation_url

    @classmethod
    def get_logo_url(cls) -> str:
        return cls._logo_url

    @classmethod
    def get_description(cls) -> str:
        return cls._description

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return the job template that a new work pool of this type starts with."""
        configuration: builtins.type[BaseJobConfiguration] = cls.job_configuration
        variables: builtins.type[BaseModel] | None = cls.job_configuration_variables
        return default_template(configuration, variables)

    @staticmethod
    def get_worker_class_from_type(type: str) -> Any:
        """Return the worker class of a type, or None when nobody offers it."""
        if type not in WorkerType._known:
            _load()
        return WorkerType._known.get(type)

    @staticmethod
    def get_all_available_worker_types() -> list[str]:
        _load()
        return sorted(WorkerType._known)


def _load() -> None:
    """Import what the entry-point group names; a package that fails to import is named and left out."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            logger.warning("Worker type %r cannot be loaded: %s", entry.name, error)
