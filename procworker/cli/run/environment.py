"""The environment variables that a command line gives to a flow run: --env and --env-file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from procworker.errors import ConfigurationError
from procworker.settings import read_dotenv


def given_environment(files: Sequence[str], pairs: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Read files in dotenv syntax, then NAME=VALUE pairs over them; NAME alone is taken from `environ`.

    Later ones win. Raises ConfigurationError.
    """
    found: dict[str, str] = {}
    for file in files:
        path = Path(file).expanduser()
        if not path.exists():
            raise ConfigurationError(f"--env-file {file} does not exist")
        if path.is_dir():
            raise ConfigurationError(f"--env-file {file} is a directory: name a file with lines NAME=VALUE")
        for name, value in read_dotenv(path):
            found[_checked(name, f"--env-file {file}")] = value
    for pair in pairs:
        name, equals, value = pair.partition("=")
        _checked(name, "--env")
        if not equals:
            if name not in environ:
                raise ConfigurationError(f"--env {name}: this variable is not set here: write --env {name}=VALUE")
            value = environ[name]
        found[name] = value
    return found


def _checked(name: str, source: str) -> str:
    if not name or any(character.isspace() or character == "\0" for character in name):
        raise ConfigurationError(f"{source}: {name!r} is no name of a variable: write NAME=VALUE")
    return name
