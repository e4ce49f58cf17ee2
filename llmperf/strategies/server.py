"""The server: I/O and CPU work in this process, inference in others.

    async with Server(model, rows=8) as server:
        async for token in server.generate("Once upon a time", max_new_tokens=32):
            print(token.text, end="")

The publication recommends it in its summary, first and second points. It does what a measurement
needs: submit, cancel, time out, the death of a process, drain. Every request has one outcome.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter, deque
from dataclasses import asdict

from llmperf import decoding, machine, models
from llmperf.decoding.requests import Request, Stop
from llmperf.decoding.sampling import Sampling
from llmperf.decoding.trace import CANCELLED, ERROR, EXPIRED, OK, REJECTED
from llmperf.models import mapped
from llmperf.strategies import messages
from llmperf.strategies.answers import Stream
from llmperf.strategies.inference_process import InferenceProcess, check_limits

TICK_S = 0.5  # how often the server looks whether a process still gives signs of life
SILENT_TICKS = 7  # without a sign for this many looks (3.5 s) it is given up
STALL_S = 300.0  # it gives signs, but no step ended for so long
START_S = 300.0  # loading a large model may take minutes
ENGINE = "llmperf.strategies.model_engine:load"


class ServerFailed(RuntimeError):
    """An inference process could not load or prepare, or it died."""


class Server:
    """Each of `processes` loads its own copy of the model (or maps one copy: `weights="shared"`, on
    the CPU) and gets an equal share of the cores. `batching` is `groups` (a batch of up to `rows`
    starts when the one before has ended; an idle process waits `window_s` for more) or `slots`
    (requests join and leave at every step). More than `max_queue` waiting requests are rejected.
    """

    def __init__(
        self,
        model: models.Model | models.LoadSpec | str,
        *,
        processes: int = 1,
        weights: str = "own",
        engine: str = ENGINE,
        max_queue: int = 256,
        **batching,
    ):
        self.model = model if isinstance(model, models.Model) else models.front(model)
        self.weights, self.max_queue = weights, max_queue
        self.counts: Counter[str] = Counter()  # outcomes so far, by status
        self.batch_sizes: deque[int] = deque(maxlen=10_000)  # requests that started together
        self._engine, self._wanted, self._batching = engine, processes, batching
        self._rows, self._used = 1, 0
        self._processes: list[InferenceProcess] = []
        self._folder = None
        self._queue: deque[Stream] = deque()  # not yet given to a process
        self._live: dict[int, tuple[Stream, InferenceProcess | None]] = {}
        self._keys = 0
        self._dead: str | None = None
        self._refuses: str | None = "the server is not started: use `async with` or start()"
        self._watching: asyncio.Task | None = None
        check_limits(processes=processes, max_queue=max_queue, **batching)

    async def __aenter__(self) -> Server:
        try:
            await self.start(self._wanted)
            await self.prepare(self._wanted, **self._batching)
        except BaseException:
            await self.close(drain=False)
            raise
        return self

    async def __aexit__(self, kind, *_) -> None:
        await self.close(drain=kind is None)

    async def start(self, processes: int) -> None:
        """Have at least so many processes with a loaded model. After a death all start anew.

        Raises ServerFailed with the process's own reason when one cannot load.
        """
        if self._dead:
            await self.close(drain=False)
        missing = range(len(self._processes), processes)
        if self.weights == "shared" and missing and not self._folder:
            self._folder = mapped.save(self.model)
        config = {
            "engine": self._engine,
            "spec": asdict(self.model.source),
            "folder": str(self._folder) if self._folder else None,
        }
        new = [InferenceProcess(place, self._on_event) for place in missing]
        self._processes += new
        for process, reply in zip(new, await self._ask(new, START_S, **config), strict=True):
            process.load_s = reply["load_s"]
        self._watching = self._watching or asyncio.create_task(self._watch())

    async def prepare(
        self,
        processes: int,
        *,
        rows: int = 8,
        batching: str = "groups",
        window_s: float = 0.002,
        loop: str = decoding.DEFAULT_LOOP,
        prompt_tokens: int = 256,
        new_tokens: int = 256,
    ) -> list[dict]:
        """Have the first `processes` warm and idle: after it the clock of a run may start.

        `prompt_tokens` and `new_tokens` bound what the slots of continuous batching hold. Gives for
        each process the `loop` that runs, the `reason` when it is not the one asked for, `threads`.
        """
        check_limits(processes=processes, rows=rows, batching=batching, window_s=window_s)
        decoding.check_loop(loop)
        self._rows, self._used, self._refuses = rows, processes, None
        self.batch_sizes.clear()
        threads = None if processes == 1 else max(1, machine.usable_cores() // processes)
        how = {"rows": rows, "batching": batching, "window_s": window_s, "loop": loop}
        how |= {"prompt": prompt_tokens, "new": new_tokens, "threads": threads}
        return await self._ask(self._processes[:processes], START_S, do="prepare", **how)

    async def report(self) -> list[dict]:
        """Memory and processor time of each process that `prepare` named, since then."""
        return await self._ask(self._processes[: self._used], START_S, do="report")

    async def close(self, drain: bool = True, timeout_s: float = 60.0) -> None:
        """Stream what was admitted (`drain`), then end the processes. May be called twice.

        What is not answered after `timeout_s`, or without `drain`, is cancelled.
        """
        self._refuses = "the server is shut down: start() starts it again"
        deadline = time.monotonic() + timeout_s
        while drain and self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for stream, _ in list(self._live.values()):
            self._end(stream, CANCELLED, "the server was shut down")
        if self._watching:
            self._watching.cancel()
        processes, self._processes = self._processes, []
        self._watching, self._dead = None, None
        run = asyncio.get_running_loop().run_in_executor
        await asyncio.gather(*(run(None, p.child.end) for p in processes))
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def pids(self, start: int = 0) -> list[int]:
        """Ids of the inference processes from the `start`-th on."""
        return [p.child.pid for p in self._processes[start:]]

    @property
    def load_s(self) -> list[float]:  # seconds that each process took to load its model
        return [p.load_s for p in self._processes]

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

        A text is tokenised, gets `max_new_tokens` and comes back as text too; a Request says both
        and gets token ids alone. Raises ValueError for a request that can never be answered. A full
        queue, a missed `deadline_s` (from now to the last token), a cancel and a dead process end
        the stream with RequestFailed.
        """
        sampling, stop = sampling or Sampling(), stop or Stop()
        self._keys += 1
        tokenizer = self.model.tokenizer if isinstance(request, str) else None
        if tokenizer:
            ids = tuple(tokenizer(request)["input_ids"])
            request = Request(self._keys, ids, max_new_tokens, seed=self._keys)
        messages.check(request, self.model.shape, sampling, deadline_s)
        message = messages.dump(self._keys, request, sampling, stop)
        stream = Stream(self._keys, message, tokenizer, self._end)
        waiting = sum(a.started_s is None for a, _ in self._live.values())
        if self._refuses:
            self._end(stream, ERROR if self._dead else REJECTED, self._refuses)
        elif waiting >= self.max_queue:
            why = f"{waiting} requests wait already, which is the limit (max_queue)"
            self._end(stream, REJECTED, why)
        else:
            self._live[stream.key] = stream, None
            self._queue.append(stream)
            if deadline_s is not None:
                late = f"not finished within its deadline of {deadline_s:g} s"
                loop = asyncio.get_running_loop()
                stream.timer = loop.call_later(deadline_s, self._end, stream, EXPIRED, late)
            self._hand_out()
        return stream

    def _hand_out(self) -> None:
        """Requests to the processes. One with several rows has the next ones waiting already."""
        most = self._rows if self._rows == 1 else 2 * self._rows
        while self._queue:
            process = min(self._processes[: self._used], key=lambda p: len(p.outstanding))
            if len(process.outstanding) >= most:
                return
            stream = self._queue.popleft()
            stream.worker = str(process.place)
            process.outstanding.add(stream.key)
            self._live[stream.key] = stream, process
            process.child.send(**stream.message)

    def _end(self, stream: Stream, status: str, reason: str | None = None) -> None:
        """The one place where a request gets its outcome."""
        if stream.status is not None:
            return  # a cancel and the last token may cross
        process = self._live.pop(stream.key, (None, None))[1]
        if process:
            process.outstanding.discard(stream.key)
            if status in (CANCELLED, EXPIRED):
                process.child.send(do="drop", key=stream.key)
        elif stream in self._queue:
            self._queue.remove(stream)
        self.counts[status] += 1
        stream.finish(status, reason)
        self._hand_out()

    def _on_event(self, process: InferenceProcess, event: dict) -> None:
        process.quiet_ticks = 0
        if process not in self._processes:
            return  # it was closed
        known = [self._live[k][0] for k in event.get("keys", ()) if k in self._live]
        match event["event"]:
            case "started":
                self.batch_sizes.append(len(event["keys"]))
                for stream in known:
                    stream.started_s = event["at"]
            case "tokens":
                for key, token, last in event["tokens"]:
                    if key in self._live:  # else it was cancelled while this was on its way
                        stream = self._live[key][0]
                        stream.push(token, last)
                        if last:
                            self._end(stream, OK)
            case "failed":
                for stream in known:
                    self._end(stream, ERROR, event["reason"])
            case "reply" if not process.reply.done():
                process.reply.set_result(event)
            case "beat" if event["stalled_s"] > STALL_S:
                process.child.kill(f"no step ended for {event['stalled_s']:.0f} s")
            case "died":
                self._on_death(event["reason"])

    def _on_death(self, reason: str) -> None:
        """When one process dies, its run is lost: all are ended, and every request is answered."""
        self._dead = self._dead or reason
        self._refuses = f"{self._dead}; start() starts it again"
        self._queue.clear()
        for stream, _ in list(self._live.values()):
            self._end(stream, ERROR, self._dead)
        for process in self._processes:
            process.child.kill("ended with another one that died")
            if process.reply and not process.reply.done():
                process.reply.set_exception(ServerFailed(self._dead))
                process.reply.exception()  # read once, so that an unawaited one is not reported

    async def _ask(
        self, processes: list[InferenceProcess], timeout_s: float, **message
    ) -> list[dict]:
        """One message to each, and their replies: a barrier. Raises ServerFailed."""
        if self._dead:
            raise ServerFailed(self._dead)
        loop = asyncio.get_running_loop()
        for process in processes:
            process.reply = loop.create_future()
            process.child.send(**message)
        waiting = asyncio.gather(*(p.reply for p in processes))
        try:
            replies = await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            self._on_death(f"the inference process gave no reply within {timeout_s:g} s")
            raise ServerFailed(self._dead) from None
        if errors := [reply["error"] for reply in replies if "error" in reply]:
            raise ServerFailed(errors[0])
        return replies

    async def _watch(self) -> None:
        """Give up a process that has fallen silent. Counts its own looks, not seconds, so that a
        blocked event loop or a laptop that slept is not taken for silence."""
        while True:
            await asyncio.sleep(TICK_S)
            for process in self._processes:
                process.quiet_ticks += process.load_s is not None  # imports may hold back beats
                if process.quiet_ticks == SILENT_TICKS:
                    process.child.kill(f"no sign of life for {TICK_S * SILENT_TICKS:g} s")
