"""Wait for what a test needs, however slow the machine is."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE_SECONDS = 600.0  # longer than anything takes; what comes to this limit is broken


def wait_until(
    condition: Callable[[], Found],
    process: subprocess.Popen | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> Found:
    """Look until a condition holds and return what it returned.

    Fails at once if the process ends before that, and after `seconds` in any case.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if process is not None and process.poll() is not None and not condition():
            said = process.stderr.read() if process.stderr else ""
            raise AssertionError(f"the process ended with {process.returncode}: {said!r}")
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain"
        time.sleep(0.02)
    return found
