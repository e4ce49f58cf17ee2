"""`Child`: the one way to start, feed, watch and end a child process. `Parent` is its other end.

Both sides send JSON objects, one a line. Plain pipes and threads: asyncio's subprocesses need an
event loop that Jupyter on Windows does not run, and `multiprocessing` imports the main module.
Queues are `queue.Queue`: on a busy machine a `SimpleQueue` may wait for ever in spite of its
timeout (CPython 3.11: a rest below zero is no limit to its lock).
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from llmperf import ROOT

EXIT_S = 5.0  # a child that was told to end may take so long
SLICE_S = 0.2  # Windows cannot interrupt a wait without a limit, so waiting is done in slices


class ChildDied(RuntimeError):
    """The child ended or fell silent: exit code and last words."""


class Child(contextlib.AbstractContextManager):
    """`python -m module arguments`; leaving a `with` block ends it.

    `on_message` gets each message in the reading thread, and None when the child has ended;
    without it, `receive` returns the messages.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        name: str = "child process",
        on_message: Callable[[dict | None], None] | None = None,
    ):
        self.name = name
        self._inbox: queue.Queue = queue.Queue()
        self._outbox: queue.Queue = queue.Queue()
        self._take = on_message or self._inbox.put
        self._last_stderr_line = "none"
        self._kill_reason = ""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            process_group=0,  # a terminal's Ctrl-C is for the parent alone
        )
        self.pid = self.process.pid
        targets = (self._write, self._read_errors, self._read)
        self._threads = [threading.Thread(target=t, daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, **message) -> None:
        """Queue a message; never blocks and never raises."""
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> dict:
        """The next message. Raises ChildDied if the child ended or is too slow (then killed)."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(queue.Empty):
                message = self._inbox.get(timeout=SLICE_S)
                if message is None:
                    self._inbox.put(None)  # for the next caller
                    raise ChildDied(self.exit_message())
                return message
            if time.monotonic() > deadline:
                self.kill(f"no answer within {timeout_s:g} s")
                raise ChildDied(self.exit_message())

    def ask(self, timeout_s: float, **message) -> dict:
        """Send a message and return the next one that comes back."""
        self.send(**message)
        return self.receive(timeout_s)

    def kill(self, because: str = "") -> None:
        """End it now; `because` replaces its last words."""
        self._kill_reason = self._kill_reason or because
        self.process.kill()

    def end(self) -> None:
        """Close its input, which tells it to go, and kill it when it stays. Repeatable.

        A grandchild may hold the pipes open: the threads that read them are then left running.
        """
        self._outbox.put(None)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_S)
        finally:  # an interrupt while waiting: killed too
            self.process.kill()
            self.process.wait()
            deadline = time.monotonic() + EXIT_S
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def __exit__(self, *_) -> None:
        self.end()

    def exit_message(self) -> str:
        """How the child ended, and why it was killed or its last line on stderr: one sentence."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        self.process.kill()  # where it closed its output and stays
        code = self.process.wait()
        if not self._kill_reason:
            self._threads[1].join(EXIT_S)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the {self.name} ended ({how}): {self._kill_reason or self._last_stderr_line}"

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # it has died; the reading thread says so
            while (message := self._outbox.get()) is not None:
                print(json.dumps(message), file=self.process.stdin, flush=True)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _read_errors(self) -> None:
        with self.process.stderr as lines:
            for line in lines:
                self._last_stderr_line = line.strip() or self._last_stderr_line

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # torn by its death in the middle of a line
                    self._take(json.loads(line))
        self._take(None)


class Parent:
    """The child's end. Make it first: prints of libraries then go to the error stream."""

    def __init__(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a child ends
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._lock = threading.Lock()

    def send(self, **message) -> None:
        """Send a message, from any thread. Ends this process when the parent is gone."""
        try:
            with self._lock:
                print(json.dumps(message), file=self._out, flush=True)
        except OSError:
            os._exit(0)

    def messages(self) -> Iterator[dict]:
        """Read messages in this thread, until the parent closes the pipe or ends."""
        return map(json.loads, iter(sys.stdin.buffer.readline, b""))

    def listen(self, take: Callable[[dict], None], at_end: Callable | None = None) -> None:
        """Read messages in a thread from now on; end this process when the parent ends.

        Only after numpy, torch and NVML were imported: on Windows a thread that waits for standard
        input deadlocks these imports (numpy#24290, cpython#78961).
        """

        def read() -> None:
            try:
                for message in self.messages():
                    take(message)
            finally:
                if at_end:
                    at_end()
                os._exit(0)  # in the middle of its work too

        threading.Thread(target=read, daemon=True).start()
