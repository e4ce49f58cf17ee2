"""The server: requests wait and their tokens arrive here, inference runs in other processes.

`with Server(model) as server: trace = server.run(workload, rows=8, on_token=print)`
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory

from llmperf import decoding, machine
from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import ERROR, EXPIRED, OK, REJECTED, Recorder, Trace
from llmperf.machine import SLICE_S, Child
from llmperf.models import Model, mapped

ENGINE = "llmperf.strategies.model_engine:load"
ROWS, WINDOW_S = 8, 0.002  # of a batch; how long an idle process waits for one to fill
START_S = 300.0  # loading a large model may take minutes
STALL_S = 300.0  # a process that has requests and says nothing for so long is ended


class ServerFailed(RuntimeError):
    """An inference process could not load or prepare, or it died."""


@dataclass
class InferenceProcess:
    """An inference process as the server sees it."""

    child: Child
    load_s: float = 0.0
    ids: set[int] = field(default_factory=set)  # requests that it has and has not finished
    heard_s: float = 0.0  # time.monotonic of its last message


def _close_on_error(method: Callable) -> Callable:
    """Close the server when `method` raises: a late reply would answer a later question."""

    @wraps(method)
    def called(self, *args, **how):
        try:
            return method(self, *args, **how)
        except BaseException:
            self.close()
            raise

    return called


class Server:
    """Inference processes, each with its own copy of the model, or with `weights="shared"` (on the
    CPU) all over one mapped copy."""

    def __init__(self, model: Model, *, weights: str = "own", engine: str = ENGINE):
        self.model, self.weights, self._engine = model, weights, engine
        self.processes: list[InferenceProcess] = []
        self._events: Queue = Queue()  # (place of the process, message or None)
        self._folder: TemporaryDirectory | None = None  # of the mapped weights
        self.device_before: dict = {}  # in use on the card before they were started

    def __enter__(self) -> Server:
        self.start(1)
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @_close_on_error
    def start(self, processes: int) -> None:
        """Start processes until so many have loaded the model. Raises ServerFailed."""
        if not all(p.child.alive for p in self.processes):
            self.close()
        new = range(len(self.processes), processes)
        if new and self.weights == "shared" and not self._folder:
            self._folder = TemporaryDirectory(prefix="llmperf-weights-", ignore_cleanup_errors=True)
            mapped.save(self.model, Path(self._folder.name))
        for place in new:
            hear = lambda message, i=place, to=self._events: to.put((i, message))  # noqa: E731
            child = Child("llmperf.strategies.inference", name="inference process", on_message=hear)
            self.processes.append(InferenceProcess(child))
        folder = self._folder and self._folder.name
        config = {"engine": self._engine, "spec": asdict(self.model.source), "folder": folder}
        for place, reply in zip(new, self._ask(new, **config), strict=True):
            self.processes[place].load_s = reply["load_s"]

    def close(self) -> None:
        """End the processes. May be called twice."""
        processes, self.processes = self.processes, []
        self._events = Queue()
        for process in processes:
            process.child.end()
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def pids(self, start: int = 0) -> list[int]:
        """Ids of the inference processes from the `start`-th on."""
        return [p.child.pid for p in self.processes[start:]]

    @_close_on_error
    def run(
        self,
        workload: Workload,
        *,
        processes: int = 1,
        rows: int = ROWS,
        batching: str = "groups",
        window_s: float = WINDOW_S,
        loop: str = decoding.DEFAULT_LOOP,
        on_token: Callable[[int, int], None] | None = None,
        **limits,
    ) -> Trace:
        """Send each request when it arrives; times are those at which a token could be read here.

        `batching` is `groups` (a batch of up to `rows` starts when the one before has ended; an
        idle process waits `window_s` for more) or `slots` (requests join and leave at every step).
        The processes share the cores. `on_token(request id, token)` is called for each token.
        `limits`: `max_queue` (more waiting requests are rejected), `concurrency` (at most so many
        in flight: a closed loop) and `deadline_s` (of a request). A process that dies ends the run;
        requests that were not answered have its reason. Raises ServerFailed when one cannot start.
        A run that raises, or is interrupted, ends the processes.
        """
        decoding.check_loop(loop)
        self.start(processes)
        requests, places = workload.requests, range(processes)
        threads = None if processes == 1 else max(1, machine.usable_cores() // processes)
        how = {"rows": rows, "batching": batching, "loop": loop, "processes": processes}
        prepared = self._ask(
            places,
            do="prepare",
            how=how | {"threads": threads},
            prompt_tokens=max(len(r.prompt_ids) for r in requests),
            new_tokens=max(r.max_new_tokens for r in requests),
            window_s=window_s if batching == "groups" else 0.0,
            sampling=asdict(workload.sampling),
        )
        loads = [p.load_s for p in self.processes[:processes]]
        traffic = _Traffic(self.processes[:processes], requests, rows, on_token, **limits)
        for found in prepared:
            traffic.recorder.ran(found["loop"], found["reason"])
        trace, reports = None, [{}] * processes
        try:
            while traffic.advance():
                if event := self._receive(traffic.wait_s()):
                    traffic.take(*event)
            trace = traffic.recorder.trace()
            reports = self._ask(places, do="report")
        except ServerFailed as error:
            self.close()
            traffic.give_up(str(error))
            trace = trace or traffic.recorder.trace()
        served = Counter(r.worker for r in trace.requests)
        trace.notes.update(
            workers=[
                {"worker": str(i), "requests": served[str(i)], "load_s": loads[i], **reports[i]}
                for i in places
            ],
            intra_op_threads=prepared[0]["threads"],
            batch_sizes=traffic.batch_sizes,
        )
        return trace

    def _receive(self, timeout_s: float) -> tuple[int, dict] | None:
        """The next message and who sent it, or None. Raises ServerFailed when a process died."""
        try:
            place, message = self._events.get(timeout=max(0.0, min(timeout_s, SLICE_S)))
        except Empty:
            return None
        if message is None:
            raise ServerFailed(self.processes[place].child.exit_message())
        self.processes[place].heard_s = time.monotonic()
        return place, message

    def _ask(self, places: Iterable[int], **message) -> list[dict]:
        """One message to each, and their replies: a barrier. Raises ServerFailed."""
        for i in places:
            self.processes[i].child.send(**message)
        replies, end = {}, time.monotonic() + START_S
        while len(replies) < len(places):
            place, reply = self._receive(SLICE_S) or (None, {})
            if "error" in reply:
                raise ServerFailed(reply["error"])
            if reply.get("event") == "reply":
                replies[place] = reply
            if time.monotonic() > end:
                raise ServerFailed(f"an inference process gave no reply within {START_S:g} s")
        return [replies[i] for i in places]


class _Traffic:
    """The requests of one run on their way to the processes and back; each gets one outcome."""

    def __init__(self, processes, requests, rows, on_token, max_queue=None, concurrency=None,
                 deadline_s=None):  # fmt: skip
        self.processes, self.on_token, self.deadline_s = processes, on_token, deadline_s
        self.most = rows if rows == 1 else 2 * rows  # a process has its next batch waiting already
        self.max_queue = len(requests) if max_queue is None else max_queue
        self.concurrency = concurrency or len(requests)
        self.arriving = deque(sorted(requests, key=lambda r: r.arrival_s))
        self.waiting: dict[int, Request] = {}  # not yet given to a process
        self.opened: dict[int, float] = {}  # request id without an outcome → when it was submitted
        self.unstarted: set[int] = set()
        self.batch_sizes: list[int] = []  # requests that started together
        self.recorder = Recorder(requests)  # the clock starts

    def advance(self) -> bool:
        """Admit, expire and hand out requests, kill stalled processes; True while some are left."""
        now = self.recorder.now()
        while self._may_send() and self.arriving[0].arrival_s <= now:
            self._admit(self.arriving.popleft(), now)
        while self.opened and self._next_deadline() <= now:
            late = f"not finished within its deadline of {self.deadline_s:g} s"
            self._end(next(iter(self.opened)), EXPIRED, late)
        self._hand_out()
        for process in self.processes:
            if process.ids and time.monotonic() - process.heard_s > STALL_S:
                process.child.kill(f"no step ended for {STALL_S:g} s")
        return bool(self.arriving or self.opened)

    def _may_send(self) -> bool:
        return bool(self.arriving) and len(self.opened) < self.concurrency

    def wait_s(self) -> float:
        """Seconds until the next arrival or deadline."""
        arrival = self.arriving[0].arrival_s if self._may_send() else math.inf
        return min(arrival, self._next_deadline()) - self.recorder.now()

    def _next_deadline(self) -> float:
        oldest = next(iter(self.opened.values()), math.inf)
        return oldest + self.deadline_s if self.deadline_s else math.inf

    def _admit(self, request: Request, now: float) -> None:
        self.recorder.submitted(request.id)
        self.opened[request.id] = now
        if len(self.unstarted) >= self.max_queue:
            why = f"{self.max_queue} requests wait already, which is the limit (max_queue)"
            self._end(request.id, REJECTED, why)
        else:
            self.waiting[request.id] = request
            self.unstarted.add(request.id)

    def _hand_out(self) -> None:
        while self.waiting:
            process = min(self.processes, key=lambda p: len(p.ids))
            if len(process.ids) >= self.most:
                return
            request = self.waiting.pop(next(iter(self.waiting)))
            if not process.ids:
                process.heard_s = time.monotonic()
            process.ids.add(request.id)
            what = {"prompt": request.prompt_ids, "new": request.max_new_tokens}
            process.child.send(do="run", key=request.id, seed=request.seed, **what)

    def take(self, place: int, event: dict) -> None:
        """A message of a process; what it says of a request that has ended is ignored."""
        known = [id for id in event.get("keys", ()) if id in self.opened]
        match event["event"]:
            case "started":
                self.batch_sizes.append(len(event["keys"]))
                self.unstarted -= set(known)
                self.recorder.started(known, str(place))
            case "failed":
                for id in known:
                    self._end(id, ERROR, event["reason"])
            case "tokens":
                for id, token, last in event["tokens"]:
                    if id not in self.opened:
                        continue
                    self.recorder.token(id, token)
                    if self.on_token:
                        self.on_token(id, token)
                    if last:
                        self._end(id, OK)

    def give_up(self, reason: str) -> None:
        """A process died: every request without an outcome has its reason."""
        for id in [*self.opened, *(r.id for r in self.arriving)]:
            self._end(id, ERROR, reason)

    def _end(self, id: int, status: str, reason: str | None = None) -> None:
        """The one place where a request gets its outcome."""
        self.opened.pop(id, None)
        self.waiting.pop(id, None)
        self.unstarted.discard(id)
        if status != OK:
            self.recorder.failed(id, status, reason)
        for process in self.processes:
            if id in process.ids:
                process.ids.discard(id)
                if status == EXPIRED:
                    process.child.send(do="drop", key=id)
