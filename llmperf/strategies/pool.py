"""Worker processes: started, spoken to, watched, and ended, all of them, when one dies or hangs."""

from __future__ import annotations

import atexit
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from llmperf.models import LoadSpec, Model, mapped

ROOT = str(Path(__file__).resolve().parent.parent.parent)
SILENCE_S = 4.0  # a working process beats every 0.25 s: this long without is a hang
LOADING_SILENCE_S = 120.0  # imports and reading weights may hold the interpreter lock
STALL_S = 300.0  # it beats, but no token came: loading a large model may take minutes
ASLEEP_S = 2.0  # when nobody listened for so long, no worker is to blame for silence


class WorkerDied(RuntimeError):
    """A worker process ended, hung or failed; the message has its exit code and last words."""


class Worker:
    """One process and the thread that hears it."""

    def __init__(self, place: int, inbox: queue.SimpleQueue):
        self.place, self.load_s, self.heard = place, None, 0.0
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        hidden = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmperf.strategies.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": path},
            creationflags=hidden,
        )
        self._ear = threading.Thread(target=self._hear, args=(inbox,), daemon=True)
        self._ear.start()

    def _hear(self, inbox: queue.SimpleQueue) -> None:
        try:
            while True:
                inbox.put((self, *pickle.load(self.process.stdout)))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            inbox.put((self, "ended", None))

    def send(self, kind: str, **values) -> None:
        """Ask for something. A worker that has died says so through its ear."""
        self.heard = time.perf_counter()
        with suppress(OSError):
            pickle.dump((kind, values), self.process.stdin)
            self.process.stdin.flush()

    def obituary(self) -> str:
        """Exit code and last words of a process that has ended."""
        code = self.process.wait()
        how = f"exit code {code}"
        if code < 0:
            how += f", {signal.Signals(-code).name}"
        return f"{how}; its last words: {self.last_words()}"

    def last_words(self) -> str:
        """The last line that it wrote to standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 4096))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "none"

    def end(self) -> None:
        """Kill it and leave nothing of it behind."""
        self.process.kill()
        self.process.wait()
        self._ear.join()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            with suppress(OSError):  # what was still to be sent
                stream.close()


class Pool:
    """Workers that hold the same model. `shared`: all map one file of its weights."""

    def __init__(self, model: Model, shared: bool):
        self.source: LoadSpec = model.source
        self.shared = shared
        self.workers: list[Worker] = []
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._listened = time.perf_counter()
        self.folder = mapped.save(model) if shared else None
        atexit.register(self.close)

    def grow(self, workers: int) -> None:
        """Start what is missing; returns when every worker has loaded."""
        new = [Worker(i, self._inbox) for i in range(len(self.workers), workers)]
        self.workers += new
        for worker in new:
            worker.send("load", source=self.source, folder=self.folder)

        def loaded(worker: Worker, load_s: float) -> None:
            worker.load_s = load_s

        self.gather(new, "load", loaded, LOADING_SILENCE_S)

    def shrink(self, workers: int) -> None:
        """End those beyond the first `workers`."""
        while len(self.workers) > workers:
            self.workers.pop().end()

    def ask(self, workers: int, kind: str, values: Callable[[Worker], Mapping]) -> list:
        """The answers of the first `workers` to one message each, in their order."""
        asked = self.workers[:workers]
        for worker in asked:
            worker.send(kind, **values(worker))
        answers = {}
        self.gather(asked, kind, lambda worker, answer: answers.update({worker.place: answer}))
        return [answers[worker.place] for worker in asked]

    def gather(self, busy: list[Worker], kind: str, take: Callable, silence_s=SILENCE_S) -> None:
        """Until each of `busy` has answered `kind`; `take(worker, answer)` gets each answer."""
        waiting = set(busy)
        while waiting:
            message = self.hear(waiting, 0.2, silence_s)
            if message and message[1] == kind:
                take(message[0], message[2])
                waiting.discard(message[0])

    def hear(self, busy: set[Worker], timeout_s: float, silence_s=SILENCE_S) -> tuple | None:
        """The next (worker, kind, answer), or None when there is none within `timeout_s`.

        Raises WorkerDied when a worker has died or failed, or one of `busy` has been silent for
        `silence_s`.
        """
        try:
            worker, kind, answer = self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            worker = None
        now = time.perf_counter()
        if now - self._listened > ASLEEP_S:
            for each in busy:
                each.heard = now
        self._listened = now
        if worker is None:
            self._check_silence(busy, silence_s)
            return None
        worker.heard = now
        self._check_alive(worker, kind, answer)
        return worker, kind, answer

    def _check_alive(self, worker: Worker, kind: str, answer) -> None:
        name = f"worker {worker.place} of {len(self.workers)}"
        if kind == "ended" and worker in self.workers:
            raise WorkerDied(f"{name} died: {worker.obituary()}")
        if kind == "failed":
            raise WorkerDied(f"{name} failed: {answer}")
        if kind == "beat" and answer > STALL_S:
            raise WorkerDied(f"{name} is alive, but gave no token for {answer:.0f} s")

    def _check_silence(self, busy: set[Worker], silence_s: float) -> None:
        for worker in busy:
            silent = time.perf_counter() - worker.heard
            if silent > silence_s:
                raise WorkerDied(
                    f"worker {worker.place} of {len(self.workers)} hung: not a sign of life for"
                    f" {silent:.1f} s; its last words: {worker.last_words()}"
                )

    def close(self) -> None:
        """End every worker and remove the file of weights."""
        atexit.unregister(self.close)
        self.shrink(0)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
