"""An inference process: it owns a model and a device, and streams tokens to the server."""

import importlib
import shutil
import sys
import time
from collections.abc import Callable
from itertools import islice
from queue import Empty, Queue

import psutil

from llmperf.decoding.requests import Request, Sampling
from llmperf.machine import Parent, first_line
from llmperf.machine.gpu import torch_in_use


class GroupedSlots:
    """A group of up to `rows` requests is one batch of `decode`; the next one waits for its end.

    It has the methods of `decoding.Slots`, and `sampling`, which may be set.
    `decode(requests, sampling=...)` gives one list of tokens a step, None for rows that ended.
    """

    def __init__(self, decode: Callable, rows: int, loop: str = "", reason: str | None = None):
        self.loop, self.reason = loop, reason
        self._decode, self._rows, self.sampling = decode, rows, Sampling()
        self._group: dict = {}  # key → request, all of the batch
        self._left: dict = {}  # key → how many tokens it still wants
        self._steps = None

    @property
    def free(self) -> int:
        return 0 if self._steps else self._rows - len(self._group)

    def admit(self, key, request: Request) -> None:
        """Add a request to the group that starts with the next step."""
        self._group[key] = request
        self._left[key] = request.max_new_tokens

    def drop(self, key) -> None:
        """The request is no longer wanted; the group ends when none is."""
        self._left.pop(key, None)
        if not self._left:
            if self._steps:
                self._steps.close()
            self._group, self._steps = {}, None

    def step(self) -> list[tuple]:
        """(key, token, whether it is the last) of each request that is still wanted."""
        if self._steps is None:
            self._steps = self._decode(list(self._group.values()), sampling=self.sampling)
        found = []
        for key, token in zip(self._group, next(self._steps), strict=True):
            if token is not None and key in self._left:
                self._left[key] -= 1
                found.append((key, token, self._left[key] == 0))
        for key, _, last in found:
            if last:
                self.drop(key)
        return found


class InferenceLoop:
    """Everything after loading: prepare for a run, step, answer, report."""

    def __init__(self, parent: Parent, inbox: Queue, make_slots: Callable):
        self._parent, self._inbox, self._make_slots = parent, inbox, make_slots
        self._slots, self._shape, self._window_s, self._cpu_s = None, None, 0.0, 0.0
        self._waiting: dict[int, tuple[Request, float]] = {}  # with the time at which it came
        self._running: set[int] = set()

    def forever(self) -> None:
        """Follow the inbox until the parent ends this process."""
        while True:
            self._read()
            self._admit()
            if self._running:
                self._step()

    def _read(self) -> None:
        """Take in what has come. An idle process waits for it, and for a group to fill."""
        while True:
            wait = 0.0 if self._running or self._waiting else None
            if self._waiting and not self._running and len(self._waiting) < self._slots.free:
                oldest = next(iter(self._waiting.values()))[1]
                wait = max(0.0, oldest + self._window_s - time.perf_counter())
            try:
                self._take(self._inbox.get(timeout=wait))
            except Empty:
                return

    def _take(self, message: dict) -> None:
        match message.pop("do"):
            case "run":
                key, prompt = message["key"], tuple(message["prompt"])
                request = Request(key, prompt, message["new"], message["seed"])
                self._waiting[key] = request, time.perf_counter()
            case "drop":
                if self._waiting.pop(message["key"], None) is None:
                    self._running.discard(message["key"])
                    self._slots.drop(message["key"])
            case what:
                try:
                    answer = self._prepare(**message) if what == "prepare" else self._report()
                except Exception as error:  # the server raises it for the run
                    answer = {"error": _sentence(error)}
                self._parent.send(event="reply", **answer)

    def _prepare(self, how, prompt_tokens, new_tokens, window_s, sampling) -> dict:
        """Make slots for `rows` requests of these lengths, and run two tokens of such a batch."""
        if (prompt_tokens, new_tokens, how) != self._shape:
            self._slots, self._shape = None, None  # its memory is free before new is taken
            self._slots = self._make_slots(max_length=prompt_tokens + new_tokens, **how)
            for rows in sorted({1, how["rows"]}):
                self._warm_up(rows, prompt_tokens, new_tokens)
            self._shape = prompt_tokens, new_tokens, how
        self._slots.sampling = Sampling(**sampling | {"suppress": tuple(sampling["suppress"])})
        self._window_s, self._cpu_s = window_s, time.process_time()
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch else None
        return {"loop": self._slots.loop, "reason": self._slots.reason, "threads": threads}

    def _warm_up(self, rows: int, prompt_tokens: int, new_tokens: int) -> None:
        keys, tokens = range(-rows, 0), 0
        for key in keys:
            self._slots.admit(key, Request(0, (0,) * prompt_tokens, new_tokens))
        while tokens < rows * min(2, new_tokens):
            tokens += len(self._slots.step())
        for key in keys:
            self._slots.drop(key)

    def _report(self) -> dict:
        """What this process holds, and the processor time since it was prepared."""
        process = psutil.Process()
        found = {"cpu_s": time.process_time() - self._cpu_s}
        found["rss_bytes"] = process.memory_info().rss
        try:
            found["uss_bytes"] = process.memory_full_info().uss
        except psutil.AccessDenied:
            found["uss_bytes"] = None
        if torch := torch_in_use():
            found["allocated_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found

    def _admit(self) -> None:
        started = list(islice(self._waiting, self._slots.free)) if self._waiting else []
        for key in started:
            request, _ = self._waiting.pop(key)
            self._slots.admit(key, request)
        if started:
            self._running.update(started)
            self._parent.send(event="started", keys=started)

    def _step(self) -> None:
        """Whatever goes wrong, every request is answered."""
        try:
            tokens = self._slots.step()
        except Exception as error:  # a bad batch must not end the process
            for key in self._running:
                self._slots.drop(key)
            self._parent.send(event="failed", keys=list(self._running), reason=_sentence(error))
            self._running.clear()
            if torch := torch_in_use():
                torch.cuda.empty_cache()
            return
        if tokens:
            self._parent.send(event="tokens", tokens=tokens)
        self._running -= {key for key, _, last in tokens if last}


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def main() -> None:
    """Load, say ready, then work until the server ends this process."""
    parent, inbox = Parent(), Queue()
    config, start = next(parent.messages()), time.perf_counter()
    folder = config["folder"]
    try:
        module, name = config["engine"].split(":")
        make_slots = getattr(importlib.import_module(module), name)(config)
    except Exception as error:
        parent.send(event="reply", error=_sentence(error))
        return
    # If the server was killed, its processes remove the folder of the shared weights.
    parent.listen(inbox.put, lambda: folder and shutil.rmtree(folder, ignore_errors=True))
    parent.send(event="reply", load_s=time.perf_counter() - start)
    InferenceLoop(parent, inbox, make_slots).forever()


if __name__ == "__main__":
    main()
