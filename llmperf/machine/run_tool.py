"""Ask another program, with a time-out and a reason when it does not answer."""

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

WINDOWS_TOOLS = Path("/mnt/c/Windows/System32")  # where WSL2 reaches the programs of its host


class Unknown(Exception):
    """A probe has no answer; its text says why."""


def run_tool(*command: str, timeout_s: float = 5.0) -> str:
    """Standard output of a program. Raises `Unknown` when it is missing, slow or fails."""
    name = command[0]
    path = shutil.which(name)
    if path is None and name.endswith(".exe") and (WINDOWS_TOOLS / name).exists():
        path = str(WINDOWS_TOOLS / name)
    if path is None:
        raise Unknown(f"{name} is not on this machine's search path")
    hidden = getattr(subprocess, "CREATE_NO_WINDOW", 0) if sys.platform == "win32" else 0
    try:
        done = subprocess.run(  # an OEM code page on Windows: only ASCII in it is relied on
            [path, *command[1:]],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            creationflags=hidden,
        )
    except subprocess.TimeoutExpired:
        raise Unknown(f"{name} gave no answer within {timeout_s:g} s") from None
    except OSError as error:
        raise Unknown(f"{name} could not be started: {error.strerror}") from None
    if done.returncode:
        raise Unknown(f"{name} ended with exit status {done.returncode}")
    return done.stdout


def ask(probe: Callable[[], object], timeout_s: float = 5.0) -> tuple[object, str | None]:
    """`(value, None)` from a probe, or `(None, reason)`; it never raises and never hangs.

    A driver call that hangs cannot be stopped from Python: its thread is left behind, and ends
    with the process.
    """
    answer: list = [None, f"no answer within {timeout_s:g} s"]

    def work() -> None:
        try:
            answer[:] = [probe(), None]
        except Unknown as error:
            answer[:] = [None, str(error)]
        except OSError as error:  # its text would name a path
            answer[:] = [None, f"{type(error).__name__}: {error.strerror}"]
        except Exception as error:  # a probe may fail in ways that nobody foresaw
            answer[:] = [None, f"the probe failed with {type(error).__name__}"]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return tuple(answer) if not thread.is_alive() else (None, f"no answer within {timeout_s:g} s")
