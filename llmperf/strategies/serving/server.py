"""The front: admits requests, hands them to inference processes, and gives each one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, deque
from dataclasses import asdict

from llmperf import decoding, models
from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling
from llmperf.decoding.trace import CANCELLED, ERROR, EXPIRED, OK, REJECTED
from llmperf.strategies.serving.admission import check_limits, check_request, message, threads_each
from llmperf.strategies.serving.answers import Answer, Stream
from llmperf.strategies.serving.process import InferenceProcess

TICK_S = 0.5  # how often the front looks whether an inference process still gives signs of life
SILENT_TICKS = 7  # without a sign for this many looks (3.5 s) it is given up
ENGINE = "llmperf.strategies.serving.worker:model_engine"


class Server:
    """Groups requests into batches in inference processes of its own.

    `max_batch` requests at most share a batch; an idle process waits `window_s` for more to come.
    `max_queue` bounds what waits: beyond it, requests are `rejected` at once. With several
    `processes`, each loads its own copy of the model and gets an equal share of the cores.
    """

    def __init__(
        self,
        model: models.Model | models.LoadSpec | str,
        *,
        max_batch: int = 8,
        window_s: float = 0.002,
        max_queue: int = 256,
        processes: int = 1,
        loop: str = "cached",
        start_timeout_s: float = 180.0,
        engine: str = ENGINE,
    ):
        decoding.check_loop(loop)
        check_limits(max_batch, window_s, max_queue, processes)
        self.model = model if isinstance(model, models.Model) else models.front(model)
        self.max_batch, self.window_s, self.max_queue = max_batch, window_s, max_queue
        self.counts: Counter[str] = Counter()  # outcomes so far, by status
        self.batch_sizes: deque[int] = deque(maxlen=10_000)  # of the last batches
        self._number, self._decoding_loop = processes, loop
        self._engine, self._start_timeout_s = engine, start_timeout_s
        self._processes: list[InferenceProcess] = []
        self._live: dict[int, tuple[Answer, InferenceProcess]] = {}
        self._waiting = 0  # admitted and not started
        self._keys = 0
        self._refuses: str | None = "the server is not started: use `async with` or start()"
        self._watching: asyncio.Task | None = None
        self._idle = asyncio.Event()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, kind, *_) -> None:
        await self.close(drain=kind is None)

    async def start(self) -> None:
        """Start the inference processes that are not running, and wait until all are loaded.

        Raises RuntimeError with the process's own reason when one cannot load. After a process has
        died, this starts a new one in its place.
        """
        missing = self._number - sum(p.alive for p in self._processes)
        new = [
            InferenceProcess(str(self._keys + i), self._config(), self._on_event)
            for i in range(missing)
        ]
        try:
            await asyncio.gather(*(p.ready(self._start_timeout_s) for p in new))
        except BaseException:
            for process in new:
                process.kill()
            await asyncio.gather(*(p.gone() for p in new))
            raise
        dead = [p for p in self._processes if not p.alive]
        self._processes = [p for p in self._processes if p.alive] + new
        for i, process in enumerate(self._processes):
            process.name = str(i)
        self._refuses = None
        self._watching = self._watching or asyncio.create_task(self._watch())
        await asyncio.gather(*(p.gone() for p in dead))

    async def close(self, drain: bool = True, timeout_s: float = 60.0) -> None:
        """Answer what was admitted (`drain`), then end the processes. May be called twice.

        What is not answered after `timeout_s`, or without `drain`, is cancelled.
        """
        self._refuses = "the server is shut down: start() starts it again"
        if drain and self._live:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        for answer, _ in list(self._live.values()):
            self._end(answer, CANCELLED, "the server was shut down")
        if self._watching:
            self._watching.cancel()
            self._watching = None
        processes, self._processes = self._processes, []
        for process in processes:
            process.send({"do": "close"})
        await asyncio.gather(*(p.gone() for p in processes))

    def configure(self, max_batch: int, window_s: float) -> None:
        """Change how requests are grouped, from the next batch on."""
        check_limits(max_batch, window_s, self.max_queue, self._number)
        self.max_batch, self.window_s = max_batch, window_s
        for process in self._processes:
            process.send({"do": "configure", "max_batch": max_batch, "window_s": window_s})

    @property
    def load_s(self) -> list[float]:
        """Seconds that each inference process took to load its model."""
        return [p.load_s for p in self._processes]

    @property
    def pids(self) -> list[int]:
        """The inference processes."""
        return [p.process.pid for p in self._processes]

    def generate(
        self,
        request: Request | str,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Stop | None = None,
        deadline_s: float | None = None,
    ) -> Stream:
        """Admit a request, now; its tokens come from the stream.

        A text is tokenised and gets `max_new_tokens`; a Request says both itself. Raises ValueError
        for a request that can never be answered. A full queue, a missed `deadline_s` (counted from
        now to the last token), a cancel and a dead process end the stream with RequestFailed.
        """
        request = self._as_request(request, max_new_tokens)
        sampling, stop = sampling or Sampling(), stop or Stop()
        check_request(request, self.model.shape, sampling, deadline_s)
        self._keys += 1
        answer = Answer(self._keys, request, self.model.tokenizer)
        stream = Stream(answer, self._end)
        refused = self._refuses or self._full()
        if refused:
            dead = self._refuses and any(not p.alive for p in self._processes)
            self._end(answer, ERROR if dead else REJECTED, refused)
            return stream
        process = min((p for p in self._processes if p.alive), key=lambda p: p.outstanding)
        answer.worker = process.name
        process.outstanding += 1
        self._waiting += 1
        self._live[answer.key] = answer, process
        if deadline_s is not None:
            late = f"not finished within its deadline of {deadline_s:g} s"
            loop = asyncio.get_running_loop()
            answer.timer = loop.call_later(deadline_s, self._end, answer, EXPIRED, late)
        process.send(message(answer.key, request, sampling, stop))
        return stream

    def _as_request(self, request: Request | str, max_new_tokens: int) -> Request:
        if isinstance(request, Request):
            return request
        if not isinstance(request, str):
            raise ValueError(f"a request is a text or a Request, not a {type(request).__name__}")
        ids = self.model.tokenizer(request)["input_ids"]
        return Request(self._keys + 1, tuple(ids), max_new_tokens, seed=self._keys + 1)

    def _full(self) -> str | None:
        if self._waiting < self.max_queue:
            return None
        return f"{self._waiting} requests wait already, which is the limit (max_queue)"

    def _config(self) -> dict:
        cores = threads_each(self._number)
        return {
            "engine": self._engine,
            "spec": asdict(self.model.source),
            "loop": self._decoding_loop,
            "threads": cores,
            "max_batch": self.max_batch,
            "window_s": self.window_s,
            "path": sys.path,
        }

    def _end(self, answer: Answer, status: str, reason: str | None = None) -> None:
        """The one place where a request gets its outcome."""
        if answer.status is not None:
            return  # a cancel and the last token may cross
        live = self._live.pop(answer.key, None)
        if live:
            live[1].outstanding -= 1
            self._waiting -= answer.started_s is None
            if status in (CANCELLED, EXPIRED):
                live[1].send({"do": "drop", "key": answer.key})
        self.counts[status] += 1
        answer.finish(status, reason)
        if not self._live:
            self._idle.set()

    def _on_event(self, process: InferenceProcess, event: dict) -> None:
        match event["event"]:
            case "started":
                self.batch_sizes.append(len(event["keys"]))
                for answer in self._known(event["keys"]):
                    answer.started_s = event["at"]
                    self._waiting -= 1
            case "tokens":
                self._on_tokens(event["tokens"], set(event["ended"]))
            case "failed":
                for answer in self._known(event["keys"]):
                    self._end(answer, ERROR, event["reason"])
            case "died":
                self._on_death(process, event["reason"])

    def _known(self, keys: list[int]) -> list[Answer]:
        return [self._live[k][0] for k in keys if k in self._live]

    def _on_tokens(self, tokens: list, ended: set[int]) -> None:
        for key, token in tokens:
            if key in self._live:  # else it was cancelled while this was on its way
                answer = self._live[key][0]
                answer.push(token, key in ended)
                if key in ended:
                    self._end(answer, OK)

    def _on_death(self, process: InferenceProcess, reason: str) -> None:
        for answer, its in list(self._live.values()):
            if its is process:
                self._end(answer, ERROR, reason)
        if process in self._processes and not any(p.alive for p in self._processes):
            self._refuses = f"{reason}; start() starts it again"

    async def _watch(self) -> None:
        """Give up a process that has fallen silent. Counts its own looks, not seconds, so that a
        blocked event loop or a laptop that slept is not taken for silence."""
        while True:
            await asyncio.sleep(TICK_S)
            for process in self._processes:
                process.quiet_ticks += 1
                if process.alive and process.quiet_ticks >= SILENT_TICKS:
                    process.kill(f"no sign of life for {TICK_S * SILENT_TICKS:g} s")
