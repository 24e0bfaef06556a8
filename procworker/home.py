"""Where the state directory is, without all the settings where they cannot matter: `procworker status` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

NAME = "PROCWORKER_HOME"


def default_state_home(env: Mapping[str, str], platform: str = sys.platform) -> str:
    """Return a private place inside tox or a CI job, else where the platform keeps state."""
    if env.get("TOX_ENV_DIR"):
        return f"{env['TOX_ENV_DIR']}/.procworker"
    if env.get("RUNNER_TEMP") and env.get("CI", "").lower() in ("true", "1"):
        return f"{env['RUNNER_TEMP']}/procworker"
    places = {
        "darwin": "~/Library/Application Support",
        "win32": env.get("LOCALAPPDATA") or "~/AppData/Local",
    }
    return f"{places.get(platform) or env.get('XDG_STATE_HOME') or '~/.local/state'}/procworker"


def plain_state_home(environ: Mapping[str, str], cwd: Path, profile: str | None = None) -> Path | None:
    """Return what Settings.load makes of the environment alone; None where a file or a profile may say otherwise."""
    env = {name.upper(): value for name, value in sorted(environ.items(), reverse=True)}
    user_home = env.get("HOME") or env.get("USERPROFILE") or os.path.expanduser("~")
    if profile or user_home == "~":
        return None
    if NAME not in env:
        profiles = env.get("PREFECT_PROFILES_PATH") or f"{env.get('PREFECT_HOME') or '~/.prefect'}/profiles.toml"
        files = [cwd / ".env", cwd / "pyproject.toml", cwd / "prefect.toml", _place(profiles, cwd, user_home)]
        if "$" in profiles or any(_mentions_us(file) for file in files):
            return None
    return _place(env.get(NAME) or default_state_home(env), cwd, user_home)


def _place(path: str, cwd: Path, user_home: str) -> Path:
    return cwd / (user_home + path[1:] if path.startswith("~/") else path)


def _mentions_us(file: Path) -> bool:
    """May this file set the directory, or lead to another file that does?"""
    try:
        text = file.read_bytes().lower()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return any(word in text for word in (b"procworker", b"home", b"profiles_path", b"tool.prefect"))
