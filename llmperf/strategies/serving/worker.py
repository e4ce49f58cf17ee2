"""The inference process: it owns the device, groups what waits into batches, and streams tokens.

`Server` starts it as `python -m llmperf.strategies.serving.worker`. Both sides speak JSON lines:
requests come on standard input, events leave on standard output. `time.perf_counter` is one clock
for all processes of a machine, so the times in the events need no translation.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling

BEAT_S = 0.5  # a sign of life this often, whatever the device is doing


@dataclass(frozen=True)
class Job:
    """A request as it crossed the pipe; `key` is the front's own number for it."""

    key: int
    request: Request
    sampling: Sampling
    stop: Stop
    came_s: float

    @classmethod
    def from_message(cls, m: dict) -> Job:
        sampling = Sampling(**{**m["sampling"], "suppress": tuple(m["sampling"]["suppress"])})
        ends = {k: frozenset(m["stop"][k]) for k in ("end_ids", "sentence_ids")}
        request = Request(m["key"], tuple(m["prompt"]), m["new"], m["seed"])
        stop = Stop(**ends, min_tokens=m["stop"]["min_tokens"])
        return cls(m["key"], request, sampling, stop, time.perf_counter())


class Inbox:
    """What waits. The reading thread fills it, the device's thread takes batches from it."""

    def __init__(self, max_batch: int, window_s: float):
        self.max_batch, self.window_s = max_batch, window_s
        self._waiting: dict[int, Job] = {}  # in order of arrival
        self._running: set[int] = set()
        self._dropped: set[int] = set()
        self._closing = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        with self._changed:
            self._waiting[job.key] = job
            self._changed.notify()

    def drop(self, key: int) -> None:
        """The caller no longer wants it: forget it, or leave it out of the running batch."""
        with self._changed:
            if self._waiting.pop(key, None) is None and key in self._running:
                self._dropped.add(key)

    def dropped(self) -> set[int]:
        """Running requests that are no longer wanted."""
        with self._changed:
            return set(self._dropped)

    def configure(self, max_batch: int, window_s: float) -> None:
        with self._changed:
            self.max_batch, self.window_s = max_batch, window_s
            self._changed.notify()

    def close(self) -> None:
        """No more will come; what waits is still answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def take(self) -> list[Job]:
        """The next batch: full, or the oldest has waited `window_s`; empty once closed and done.

        Requests of a batch share one way of drawing and ending, that of the oldest. What came while
        the last batch ran has waited long enough, so a busy device is refilled without a pause.
        """
        with self._changed:
            self._running.clear()
            self._dropped.clear()
            while True:
                batch = self._group()
                if not batch and self._closing:
                    return []
                left = batch[0].came_s + self.window_s - time.perf_counter() if batch else None
                if batch and (len(batch) >= self.max_batch or left <= 0 or self._closing):
                    break
                self._changed.wait(left)
            for job in batch:
                del self._waiting[job.key]
            self._running.update(job.key for job in batch)
            return batch

    def _group(self) -> list[Job]:
        batch: list[Job] = []
        for job in self._waiting.values():
            if not batch or (job.sampling, job.stop) == (batch[0].sampling, batch[0].stop):
                batch.append(job)
            if len(batch) >= self.max_batch:
                break
        return batch


def model_engine(config: dict) -> Callable:
    """Load the model that `config["spec"]` describes; returns its decoding loop, warmed up."""
    import torch

    from llmperf import decoding, models

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model = models.load_spec(models.LoadSpec(**config["spec"]))

    def decode(requests, sampling, stop):
        return decoding.decode(model, requests, loop=config["loop"], sampling=sampling, stop=stop)

    list(decode([Request(0, (0, 0), 2)], Sampling(), Stop()))
    return decode


def run_batch(jobs: list[Job], decode: Callable, inbox: Inbox, send: Callable) -> None:
    """Decode one batch and send each step's tokens; whatever goes wrong, every row is answered."""
    left = {job.key: job for job in jobs}
    send({"event": "started", "keys": list(left), "at": time.perf_counter()})
    try:
        steps = decode([j.request for j in jobs], jobs[0].sampling, jobs[0].stop)
        for n, row in enumerate(steps, start=1):
            rows = zip(jobs, row, strict=True)
            tokens = [(j.key, t) for j, t in rows if t is not None and j.key in left]
            ended = [k for k, t in tokens if _last(left[k], t, n)]
            send({"event": "tokens", "tokens": tokens, "ended": ended, "at": time.perf_counter()})
            for key in (*ended, *inbox.dropped()):
                left.pop(key, None)
            if not left:
                steps.close()
                return
        reason = "the decoding loop ended before the request did"
    except Exception as error:  # one bad batch must not end the process
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _release()
    send({"event": "failed", "keys": list(left), "reason": reason})


def _last(job: Job, token: int, n: int) -> bool:
    return n >= job.request.max_new_tokens or job.stop.ends(token, n)


def _release() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _read(lines: Iterator[bytes], inbox: Inbox) -> None:
    """Follow the front's messages. Its end without a word means that the front has died."""
    for line in lines:
        message = json.loads(line)
        match message.pop("do"):
            case "run":
                inbox.put(Job.from_message(message))
            case "drop":
                inbox.drop(message["key"])
            case "configure":
                inbox.configure(**message)
            case "close":
                inbox.close()
                return
    os._exit(1)  # nobody is left to read an answer


def _sender() -> Callable[[dict], None]:
    """Events go to the real standard output; what libraries print goes to the error stream."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    lock = threading.Lock()

    def send(event: dict) -> None:
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with lock:
            out.write(line)
            out.flush()

    return send


def _beat(send: Callable) -> None:
    while True:
        time.sleep(BEAT_S)
        send({"event": "beat"})


def main() -> None:
    """Load, say ready, then answer until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a notebook is not for this process
    send = _sender()
    lines = iter(sys.stdin.buffer.readline, b"")
    config = json.loads(next(lines))
    sys.path[:0] = [p for p in config["path"] if p not in sys.path]
    inbox = Inbox(config["max_batch"], config["window_s"])
    threading.Thread(target=_beat, args=(send,), daemon=True).start()
    start = time.perf_counter()
    try:
        module, name = config["engine"].split(":")
        decode = getattr(importlib.import_module(module), name)(config)
    except Exception as error:
        send({"event": "unable", "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    threading.Thread(target=_read, args=(lines, inbox), daemon=True).start()
    send({"event": "ready", "load_s": time.perf_counter() - start, "pid": os.getpid()})
    while batch := inbox.take():
        run_batch(batch, decode, inbox, send)
    send({"event": "bye"})


if __name__ == "__main__":
    main()
