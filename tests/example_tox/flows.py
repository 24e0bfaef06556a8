"""What the example of a tox matrix runs in every cell."""

import os
from pathlib import Path

from prefect import __version__, flow, task


@task(retries=1)
def letters(word: str) -> int:
    return len(word)


@flow(log_prints=True)
def hello(cell: str) -> int:
    """Greet the cell, and write down what it saw of its surroundings."""
    greeting = os.environ["GREETING"]
    print(f"{greeting}, {cell}, from Prefect {__version__}!")
    saw = {"greeting": greeting, "prefect": __version__, "api": os.environ["PREFECT_API_URL"]}
    saw |= {"home": os.environ.get("PROCWORKER_HOME", ""), "directory": os.getcwd(), "letters": letters(greeting)}
    Path(os.environ["TOX_ENV_DIR"], "saw.txt").write_text("".join(f"{name}={value}\n" for name, value in saw.items()))
    return saw["letters"]
