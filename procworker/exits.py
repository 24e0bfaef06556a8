"""What exit codes of a run's infrastructure usually mean."""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class ExitMeaning:
    """What an exit code usually says, and what to look at next."""

    text: str
    hint: str

    def __str__(self) -> str:
        return f"{self.text} {self.hint}"


def explain_exit(code: int) -> ExitMeaning:
    """Say what an exit code means (contract 5.4)."""
    if code in _MEANINGS:
        return _MEANINGS[code]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return ExitMeaning(f"It was ended by {name}.", "Look for a crash of native code in its last output.")
    return ExitMeaning("It ended with an unexpected status.", "Read the last lines of its output.")


_MEANINGS = {
    -9: ExitMeaning(
        "It was ended by SIGKILL: by hand, or by the system when memory ran out.",
        "Check how much memory the flow needs; the kernel's log names what it killed.",
    ),
    -15: ExitMeaning(
        "It was ended by SIGTERM: a shutdown or a cancel from outside.",
        "If nobody cancelled it, look at what stops processes on this host.",
    ),
    1: ExitMeaning(
        "It ended with a general error.",
        "Look for an exception in the last lines of its output; often the flow could not be loaded.",
    ),
    125: ExitMeaning("A container could not be run.", "Check image, entry point and container runtime."),
    126: ExitMeaning("The command is not executable.", "Check the permissions of the command."),
    127: ExitMeaning("The command was not found.", "Check PATH and whether the command is installed."),
    137: ExitMeaning("It was killed, most likely because memory ran out.", "Give it more memory."),
    143: ExitMeaning("It was ended by SIGTERM inside a wrapper.", "Look at what stops processes on this host."),
    247: ExitMeaning("It was ended for its memory use.", "Give it more memory, or profile it."),
    0xC000013A: ExitMeaning("It was ended by Ctrl-C or Ctrl-Break.", "Start it again if that was not meant."),
}
