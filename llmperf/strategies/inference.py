"""An inference process: it owns a model and a device, and streams tokens to the server.

`Server` starts it as `python -m llmperf.strategies.inference`. `time.perf_counter` is one clock for
all processes of a machine, so the times in its messages need no translation.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling
from llmperf.machine.child import Parent
from llmperf.strategies import messages

BEAT_S = 0.5  # a sign of life this often, whatever the device is doing


@dataclass(frozen=True)
class Job:
    """A request as it crossed the pipe; `key` is the server's number for it."""

    key: int
    request: Request
    sampling: Sampling
    stop: Stop
    came_s: float


class Inbox:
    """What waits. The reading thread fills it, the device's thread takes from it."""

    def __init__(self):
        self._jobs: dict[int, Job] = {}  # in order of arrival
        self._dropped: set[int] = set()
        self._controls: deque[dict] = deque()
        self._changed = threading.Condition()

    def put(self, message: dict) -> None:
        """Take in a message of the server."""
        with self._changed:
            if message["do"] == "run":
                job = Job(message["key"], *messages.load(message), time.perf_counter())
                self._jobs[job.key] = job
            elif message["do"] != "drop":
                self._controls.append(message)
            elif self._jobs.pop(message["key"], None) is None:
                self._dropped.add(message["key"])
            self._changed.notify()

    def take(self, free: int, idle: bool, window_s: float = 0.0) -> tuple[list, list, set]:
        """(control messages, jobs for `free` slots, keys that are no longer wanted).

        An idle process waits for something to do, and for a group that is not full until its oldest
        job has waited `window_s`. Jobs that are taken together are sampled and stopped alike.
        """
        with self._changed:
            while True:
                jobs = self._group(free)
                left = jobs[0].came_s + window_s - time.perf_counter() if jobs else None
                if self._controls or not idle or (jobs and (len(jobs) >= free or left <= 0)):
                    break
                self._changed.wait(left)
            controls = list(self._controls)
            self._controls.clear()
            jobs = [] if controls else jobs
            for job in jobs:
                del self._jobs[job.key]
            dropped, self._dropped = self._dropped, set()
            return controls, jobs, dropped

    def _group(self, free: int) -> list[Job]:
        first = next(iter(self._jobs.values()), None)
        alike = (
            j for j in self._jobs.values() if (j.sampling, j.stop) == (first.sampling, first.stop)
        )
        return [job for job, _ in zip(alike, range(free), strict=False)]


class Work:
    """Everything after loading: prepare for a run, step, answer, report."""

    def __init__(self, parent: Parent, inbox: Inbox, make_slots: Callable):
        self._parent, self._inbox, self._make_slots = parent, inbox, make_slots
        self._slots, self._shape, self._window_s = None, None, 0.0
        self._running: dict[int, Job] = {}
        self._cpu_s = 0.0
        self.stepped_s = time.perf_counter()

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step, when there is something to step."""
        return time.perf_counter() - self.stepped_s if self._running else 0.0

    def forever(self) -> None:
        """Follow the inbox until the parent ends this process."""
        while True:
            idle = not self._running
            free = self._slots.free if self._slots else 0
            controls, jobs, dropped = self._inbox.take(free, idle, self._window_s)
            for message in controls:
                self._control(message)
            for key in dropped & self._running.keys():
                self._slots.drop(key)
                del self._running[key]
            self._admit(jobs)
            if self._running:
                self._step()

    def _control(self, message: dict) -> None:
        try:
            answer = {"prepare": self._prepare, "report": self._report}[message.pop("do")](
                **message
            )
        except Exception as error:  # the server raises it for the run
            answer = {"error": _sentence(error)}
        self._parent.send(event="reply", **answer)

    def _prepare(self, window_s: float, prompt: int, new: int, **how) -> dict:
        """Make slots for `rows` requests of these lengths, and run two tokens of such a batch."""
        shape = (prompt, new, *how.items())
        if shape != self._shape:
            self._slots, self._shape = None, None  # its memory is free before new is taken
            self._slots = self._make_slots(max_length=prompt + new, **how)
            for rows in {1, how["rows"]}:
                keys = range(-rows, 0)
                for key in keys:
                    self._slots.admit(key, Request(0, (0,) * prompt, new), Sampling(), Stop())
                tokens = 0
                while tokens < rows * min(2, new):
                    tokens += len(self._slots.step())
                for key in keys:
                    self._slots.drop(key)
            self._shape = shape
        self._window_s, self._cpu_s = window_s, time.process_time()
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch else None
        return {"loop": self._slots.loop, "reason": self._slots.reason, "threads": threads}

    def _report(self) -> dict:
        """What this process holds, and the processor time since it was prepared."""
        process = psutil.Process()
        found = {"cpu_s": time.process_time() - self._cpu_s}
        found["rss_bytes"] = process.memory_info().rss
        try:
            found["uss_bytes"] = process.memory_full_info().uss
        except psutil.AccessDenied:
            found["uss_bytes"] = None
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            found["allocated_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found

    def _admit(self, jobs: list[Job]) -> None:
        for job in jobs:
            try:
                self._slots.admit(job.key, job.request, job.sampling, job.stop)
                self._running[job.key] = job
            except ValueError as error:  # it can never fit
                self._parent.send(event="failed", keys=[job.key], reason=_sentence(error))
        if started := [job.key for job in jobs if job.key in self._running]:
            self.stepped_s = time.perf_counter()
            self._parent.send(event="started", keys=started, at=self.stepped_s)

    def _step(self) -> None:
        """Whatever goes wrong, every request is answered."""
        try:
            tokens = self._slots.step()
        except Exception as error:  # a bad batch must not end the process
            for key in self._running:
                self._slots.drop(key)
            self._parent.send(event="failed", keys=list(self._running), reason=_sentence(error))
            self._running.clear()
            torch = sys.modules.get("torch")
            if torch and torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            return
        self.stepped_s = time.perf_counter()
        if tokens:
            self._parent.send(event="tokens", tokens=tokens)
        for key, _, last in tokens:
            if last:
                del self._running[key]


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def main() -> None:
    """Load, say ready, then work until the server ends this process."""
    parent, inbox = Parent(), Inbox()
    config = next(parent.messages())
    folder = config["folder"]
    work: list[Work] = []

    def beat() -> None:
        while True:
            time.sleep(BEAT_S)
            parent.send(event="beat", stalled_s=work[0].stalled_s if work else 0.0)

    threading.Thread(target=beat, daemon=True).start()
    start = time.perf_counter()
    try:
        module, name = config["engine"].split(":")
        engine = getattr(importlib.import_module(module), name)
        # The weights' file goes with the last process when nobody else is left to remove it.
        parent.listen(inbox.put, lambda: folder and shutil.rmtree(folder, ignore_errors=True))
        work.append(Work(parent, inbox, engine(config)))
    except Exception as error:
        parent.send(event="reply", error=_sentence(error))
        return
    parent.send(event="reply", load_s=time.perf_counter() - start)
    work[0].forever()


if __name__ == "__main__":
    main()
