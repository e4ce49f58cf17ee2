"""The front's handle on one inference process: start it, send to it, hear from it, notice its end.

Plain pipes and threads, since asyncio's own subprocesses need an event loop that Jupyter on Windows
does not run. Writing has a thread of its own: a process that has stopped reading must not stop
the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from llmperf import ROOT

PACKAGES = str(ROOT)  # where `llmperf` is imported from
STDERR_LINES = 20  # the last words of a process that died
EXIT_S = 5.0  # how long an ended process may take to go


class InferenceProcess:
    """One `llmperf.strategies.serving.worker`. `on_event(self, event)` runs in the event loop.

    An event is a dict of the worker, or `{"event": "died", "reason": ...}`, which is the last one.
    """

    def __init__(self, name: str, config: dict, on_event: Callable[[InferenceProcess, dict], None]):
        self.name = name
        self.load_s: float | None = None
        self.alive = True
        self.outstanding = 0  # requests sent to it that have no answer yet
        self.quiet_ticks = 0  # of the front's watch, since it was last heard
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._because = ""  # why the front ended it
        self._ready: asyncio.Future = self._loop.create_future()
        self._outbox: SimpleQueue = SimpleQueue()
        self._last_words: deque[str] = deque(maxlen=STDERR_LINES)
        path = os.pathsep.join([PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmperf.strategies.serving.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.send(config)
        self._threads = [self._thread(f) for f in (self._write, self._hear_errors, self._hear)]

    def _thread(self, target: Callable) -> threading.Thread:
        thread = threading.Thread(target=target, daemon=True, name=f"{target.__name__} {self.name}")
        thread.start()
        return thread

    async def ready(self, timeout_s: float) -> None:
        """Until the model is loaded. Raises RuntimeError when it cannot be, or not in time."""
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            self.kill()
            raise RuntimeError(
                f"the inference process was not ready after {timeout_s:g} s: give start_timeout_s"
                " more, or load a smaller model"
            ) from None

    def send(self, message: dict) -> None:
        """Queue a message; never blocks."""
        self._outbox.put(message)

    def kill(self, because: str = "") -> None:
        """End it now; the `died` event follows."""
        self._because = because
        self.process.kill()

    async def gone(self, timeout_s: float = EXIT_S) -> None:
        """Until the process has ended; it is killed when it takes longer than `timeout_s`."""

        def wait() -> None:
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self._outbox.put(None)
            for thread in self._threads:
                thread.join(EXIT_S)
            self.process.stdout.close()
            self.process.stderr.close()

        await self._loop.run_in_executor(None, wait)

    # The three threads.

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
                self.process.stdin.write(line)
                self.process.stdin.flush()
            except OSError:
                break  # it has died; the hearing thread says so
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _hear_errors(self) -> None:
        for line in self.process.stderr:
            self._last_words.append(line.decode(errors="replace").rstrip())

    def _hear(self) -> None:
        for line in self.process.stdout:
            try:
                self._post(json.loads(line))
            except ValueError:  # torn by the process's death in the middle of a line
                continue
        self._post({"event": "died", "reason": self._why()})

    def _why(self) -> str:
        try:
            code = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        words = next((line for line in reversed(self._last_words) if line.strip()), "")
        words = self._because or words
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the inference process ended ({how})" + f": {words}" * bool(words)

    def _post(self, event: dict) -> None:
        with contextlib.suppress(RuntimeError):  # a closed event loop: nobody is left to tell
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: dict) -> None:
        self.quiet_ticks = 0
        kind = event["event"]
        if kind == "ready":
            self.load_s = event["load_s"]
        if kind in ("ready", "unable", "died") and not self._ready.done():
            if kind == "ready":
                self._ready.set_result(None)
            else:
                self._ready.set_exception(RuntimeError(event["reason"]))
                self._ready.exception()  # read once, so that an unawaited one is not reported
        if kind == "died":
            self.alive = False
        self._on_event(self, event)
