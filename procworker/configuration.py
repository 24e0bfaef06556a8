"""Turn a work pool's job template and the variables of a run into the job to start."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from datetime import timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import UUID

from pydantic import BaseModel, Field, PrivateAttr, field_validator
from pydantic.json_schema import GenerateJsonSchema

from procworker import __version__
from procworker.errors import ConfigurationError
from procworker.redaction import secrets_in
from procworker.server.models import Deployment, Flow, FlowRun, Named, WorkPool
from procworker.settings import Settings
from procworker.template import (
    NotSet,
    Resolver,
    apply_values,
    deep_merge,
    resolve_block_document_references,
    resolve_variables,
    set_in_dict,
    unknown_placeholders,
)

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

JSON = dict[str, Any]


class BaseJobConfiguration(BaseModel):
    """What a worker needs to start one flow run; subclasses add fields.

    A field's place in the job template is `{{ <field> }}`, or what `Field(json_schema_extra={"template": ...})` says.
    """

    command: str | None = Field(
        default=None,
        description="The command that starts a flow run. Leave it blank to let the worker choose.",
    )
    env: dict[str, str | None] = Field(
        default_factory=dict,
        title="Environment Variables",
        description="Environment variables of a flow run; null removes an inherited one.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of what the worker creates for a flow run.",
    )
    name: str | None = Field(
        default=None,
        description="Name of what the worker creates; may hold {{ ctx.flow.* }} and {{ ctx.flow_run.* }}.",
    )

    _related_objects: dict[str, Any] = PrivateAttr(default_factory=dict)
    _inherited: dict[str, str] | None = PrivateAttr(default=None)
    _block_secrets: frozenset[str] = PrivateAttr(default=frozenset())

    @property
    def is_using_a_runner(self) -> bool:
        """Does the command hand the run to a runner that cancels it by itself?"""
        return self.command is not None and "prefect flow-run execute" in self.command

    @field_validator("command")
    @classmethod
    def _blank_is_none(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("env", mode="before")
    @classmethod
    def _values_are_text(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: None if entry is None else str(entry) for name, entry in value.items()}

    @classmethod
    async def from_template_and_values(
        cls, base_job_template: JSON, values: JSON, client: Resolver | None = None
    ) -> Self:
        """Fill the template with the values (over its own defaults) and build the configuration.

        `client` looks up block and variable references. Raises ConfigurationError or pydantic's ValidationError.
        """
        filled, secrets = fill_template(base_job_template, values), set[str]()
        filled = await resolve_block_document_references(filled, client, secrets)
        configuration = cls(**await resolve_variables(filled, client))
        configuration._block_secrets = frozenset(secrets)
        return configuration

    @property
    def secrets(self) -> frozenset[str]:
        """What of it no output may show: values of `env` whose names look secret, and secrets of the blocks in it."""
        return self._block_secrets | (secrets_in(self.env) if isinstance(self.env, Mapping) else frozenset())

    @classmethod
    async def resolve_for_flow_run(
        cls,
        flow_run: FlowRun,
        *,
        client: Any,
        work_pool: WorkPool,
        worker_name: str,
        worker_id: UUID | None = None,
        deployment: Deployment | None = None,
    ) -> Self:
        """Read what the run belongs to and build its prepared configuration."""
        if deployment is None and flow_run.deployment_id:
            deployment = await client.read_deployment(flow_run.deployment_id)
        flow = await client.read_flow(flow_run.flow_id)
        variables = merge_job_variables(deployment.job_variables if deployment else {}, flow_run.job_variables)
        configuration = await cls.from_template_and_values(work_pool.base_job_template, variables, client)
        configuration.prepare(flow_run, deployment, flow, work_pool, worker_name, worker_id)
        return configuration

    @classmethod
    def json_template(cls) -> JSON:
        """Return each field's template, by field name."""
        properties = cls.model_json_schema()["properties"]
        return {name: schema.get("template") or f"{{{{ {name} }}}}" for name, schema in properties.items()}

    def prepare(
        self,
        flow_run: FlowRun,
        deployment: Deployment | None,
        flow: Flow | None,
        work_pool: WorkPool | None,
        worker_name: str | None,
        worker_id: UUID | None,
    ) -> None:
        """Call `prepare_for_flow_run` with as many arguments as this class's version takes (2.x took three)."""
        extra: dict[str, Any] = {"work_pool": work_pool, "worker_name": worker_name, "worker_id": worker_id}
        taken = _parameters(type(self).prepare_for_flow_run)
        keywords = {name: value for name, value in extra.items() if taken is None or name in taken}
        self.prepare_for_flow_run(flow_run, deployment, flow, **keywords)

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: Deployment | None = None,
        flow: Flow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Add what depends on the flow run: environment, labels, name and command (contract 4.7)."""
        self._related_objects = {"deployment": deployment, "flow": flow, "flow-run": flow_run}
        env = {
            **self._base_environment(),
            **(self.env if isinstance(self.env, dict) else {}),  # a subclass may have another form of its own
            **_run_environment(flow_run, deployment, flow, worker_name, worker_id),
        }
        self.env = {name: value for name, value in env.items() if value is not None}
        self.labels = {
            **self._base_flow_run_labels(flow_run),
            **self._base_work_pool_labels(work_pool),
            **self._base_worker_name_label(worker_name),
            **self._base_flow_labels(flow),
            **self._base_deployment_labels(deployment),
            **self.labels,
        }
        if self.name:
            context = {
                "flow": flow.model_dump(mode="json") if flow else {},
                "flow_run": flow_run.model_dump(mode="json"),
            }
            rendered = apply_values(self.name, {"ctx": context})
            self.name = None if rendered is NotSet else str(rendered)
        self.name = self.name or flow_run.name
        self.command = self.command or self._base_flow_run_command()

    def _base_environment(self) -> dict[str, str]:
        """What the job's own `env` is laid over: the settings that were set, or what the worker hands down."""
        return Settings.load().exported if self._inherited is None else self._inherited

    @staticmethod
    def _base_flow_run_command() -> str:
        return "prefect flow-run execute"

    @staticmethod
    def _base_flow_run_labels(flow_run: FlowRun) -> dict[str, str]:
        return {**_identity("flow-run", flow_run), "prefect.io/version": f"procworker-{__version__}"}

    @staticmethod
    def _base_work_pool_labels(work_pool: WorkPool | None) -> dict[str, str]:
        return _identity("work-pool", work_pool)

    @staticmethod
    def _base_worker_name_label(worker_name: str | None) -> dict[str, str]:
        return {"prefect.io/worker-name": worker_name} if worker_name else {}

    @staticmethod
    def _base_flow_labels(flow: Flow | None) -> dict[str, str]:
        return _identity("flow", flow)

    @staticmethod
    def _base_deployment_labels(deployment: Deployment | None) -> dict[str, str]:
        labels = _identity("deployment", deployment)
        if deployment and deployment.updated:
            labels["prefect.io/deployment-updated"] = deployment.updated.astimezone(timezone.utc).isoformat()
        return labels


@lru_cache(maxsize=256)
def _parameters(method: Any) -> frozenset[str] | None:
    """Names of a method's parameters; None when it takes any keyword."""
    parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def merge_job_variables(deployment: Mapping[str, Any] | None, flow_run: Mapping[str, Any] | None) -> JSON:
    """Lay the run's variables over the deployment's; only two `env` mappings are merged key by key."""
    below, above = dict(deployment or {}), dict(flow_run or {})
    if isinstance(below.get("env"), dict) and isinstance(env := above.get("env") or {}, dict):
        above["env"] = {**below["env"], **env}
    return {**below, **above}


def fill_template(base_job_template: JSON, values: Mapping[str, Any]) -> JSON:
    """Lay values over the template's defaults and fill its job configuration (contract 4.2, steps 3 to 8)."""
    for part in ("job_configuration", "variables"):
        if not isinstance(base_job_template.get(part), dict):
            raise ConfigurationError(f"the base job template has no {part!r}: `procworker template` prints a whole one")
    properties: JSON = base_job_template["variables"].get("properties") or {}
    job = dict(base_job_template["job_configuration"])
    variables = {
        name: schema["default"]
        for name, schema in properties.items()
        if isinstance(schema, dict) and schema.get("default") is not None
    }
    if default_env := variables.get("env"):
        mergeable = isinstance(job.get("env"), dict) and isinstance(default_env, dict)
        job["env"] = {**job["env"], **default_env} if mergeable else default_env
    variables.update(_expand_dotted(values))
    if isinstance(job.get("env"), dict) and (env := variables.get("env")):
        if not isinstance(env, Mapping):
            raise ConfigurationError("the job variable 'env' must be a mapping of names to texts")
        job["env"] = {**job["env"], **env}
    known = frozenset(properties) | frozenset(variables)
    for name, nearest in unknown_placeholders(job, known | {"ctx"}):
        if nearest:  # anything else is a shell's heredoc sooner than a typing error
            logger.warning("<< %s >> in the job template is no variable and stays: did you mean %r?", name, nearest)
    filled: JSON = apply_values(job, variables, known=known)
    return filled


def _expand_dotted(values: Mapping[str, Any]) -> JSON:
    """Turn {"env.X": 1} into {"env": {"X": 1}}; plain keys go on top and win."""
    expanded: JSON = {}
    for name, value in values.items():
        if "." in name:
            try:
                set_in_dict(expanded, name, value)
            except TypeError as error:
                raise ConfigurationError(f"job variable {name!r} goes through a value that is no mapping") from error
    for name, value in values.items():
        if "." not in name:
            both = isinstance(expanded.get(name), dict) and isinstance(value, dict)
            expanded[name] = deep_merge(expanded[name], value) if both else value
    return expanded


def _run_environment(
    flow_run: FlowRun,
    deployment: Deployment | None,
    flow: Flow | None,
    worker_name: str | None,
    worker_id: UUID | None,
) -> dict[str, str]:
    attribution = {
        "PREFECT__FLOW_RUN_ID": flow_run.id,
        "PREFECT__WORKER_ID": worker_id,
        "PREFECT__WORKER_NAME": worker_name,
        "PREFECT__FLOW_ID": flow_run.flow_id,
        "PREFECT__FLOW_NAME": flow and flow.name,
        "PREFECT__DEPLOYMENT_ID": flow_run.deployment_id,
        "PREFECT__DEPLOYMENT_NAME": deployment and deployment.name,
    }
    return {name: str(value) for name, value in attribution.items() if value}


def _identity(kind: str, thing: Named | None) -> dict[str, str]:
    """Label a job with the id and the name of what it belongs to."""
    return {f"prefect.io/{kind}-id": str(thing.id), f"prefect.io/{kind}-name": thing.name} if thing else {}


class BaseVariables(BaseModel):
    """The job variables that a work pool offers to deployments and runs."""

    name: str | None = Field(default=None, description="Name of what the worker creates for a flow run.")
    env: dict[str, str | None] = Field(
        default_factory=dict,
        title="Environment Variables",
        description="Environment variables of a flow run; null removes an inherited one.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Labels of what the worker creates for a flow run."
    )
    command: str | None = Field(
        default=None,
        description="The command that starts a flow run. Leave it blank to let the worker choose.",
    )

    @classmethod
    def model_json_schema(  # type: ignore[override]  # pydantic's releases differ in the types of these
        cls,
        by_alias: bool = True,
        ref_template: str = "#/definitions/{model}",
        schema_generator: type[GenerateJsonSchema] = GenerateJsonSchema,
        mode: Literal["validation", "serialization"] = "validation",
        **options: Any,
    ) -> JSON:
        """Return the schema in the form that Prefect's servers and UI read: `definitions`, not `$defs`."""
        return _server_schema(super().model_json_schema(by_alias, ref_template, schema_generator, mode, **options))


def _server_schema(schema: JSON) -> JSON:
    if "$defs" in schema:
        schema["definitions"] = schema.pop("$defs")
    for part in (schema, *schema.get("definitions", {}).values()):
        part.pop("additionalProperties", None)
    return schema


def default_template(configuration: type[BaseJobConfiguration], variables: type[BaseModel] | None) -> JSON:
    """Return the base job template of a worker type (contract 4.1)."""
    copy: JSON = json.loads(_default_template(configuration, variables))
    return copy


@lru_cache
def _default_template(configuration: type[BaseJobConfiguration], variables: type[BaseModel] | None) -> str:
    if variables is None:
        schema = configuration.model_json_schema(ref_template="#/definitions/{model}")
        for entry in schema["properties"].values():
            entry.pop("template", None)
    else:
        schema = variables.model_json_schema()
    schema = _server_schema(schema)
    schema.pop("title", None)
    return json.dumps({"job_configuration": configuration.json_template(), "variables": schema})


def with_extra_variables(base_job_template: JSON, own_template: JSON, names: frozenset[str]) -> JSON:
    """Add variables that Prefect's own template lacks to a copy of a template that has none of them.

    A template that has one of them was made by procworker: what it lacks, an administrator removed.
    """
    job = base_job_template.get("job_configuration")
    schema = base_job_template.get("variables")
    if not isinstance(job, dict) or not isinstance(schema, dict):
        return base_job_template
    properties = schema.get("properties") or {}
    if names & (set(job) | set(properties)):
        return base_job_template
    own_properties = own_template["variables"]["properties"]
    return {
        **base_job_template,
        "job_configuration": {
            **job,
            **{name: own_template["job_configuration"][name] for name in sorted(names)},
        },
        "variables": {
            **schema,
            "properties": {**properties, **{name: own_properties[name] for name in sorted(names)}},
        },
    }


class BaseWorkerResult(BaseModel):
    """How the infrastructure of a run ended; truthy when its status code is 0.

    `explanation` says what a non-zero code means, `remarks` are further sentences for the final state's message, `tail`
    holds the last lines of output.
    """

    identifier: str
    status_code: int
    explanation: str = ""
    remarks: list[str] = Field(default_factory=list)
    tail: list[str] = Field(default_factory=list, repr=False)

    def __bool__(self) -> bool:
        return self.status_code == 0


C = TypeVar("C", bound=BaseJobConfiguration)
V = TypeVar("V", bound=BaseVariables)
R = TypeVar("R", bound=BaseWorkerResult)
