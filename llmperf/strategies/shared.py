"""What the strategies share: options checked before work, threads that end together, the GIL."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from llmperf.decoding.requests import Request
from llmperf.decoding.trace import Recorder

RUN_OPTIONS = ("loop", "on_step")  # every run gets these from its condition
SLEEP_S = 0.05  # the longest sleep before somebody looks whether the run was cancelled


class Cancelled(Exception):
    """The run was ended from outside: by Ctrl-C, or because another worker failed."""


def check_options(strategy: str, options: Mapping, known: Iterable[str]) -> None:
    """Raise ValueError for an option that this strategy does not have."""
    unknown = [name for name in options if name not in (*known, *RUN_OPTIONS)]
    if unknown:
        there = ", ".join(known) or "none"
        raise ValueError(f"{strategy} has no option {unknown[0]!r}: its options are {there}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose {' or '.join(choices)}")


def check_count(name: str, value: object, most: int | None = None, why: str = "") -> None:
    """Raise ValueError unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}, but {why}: use at most {most}")


def check_workers(level: int, options: Mapping) -> None:
    """Raise ValueError unless `workers` is between 1 and the number of requests."""
    why = f"there are only {level} requests"
    check_count("workers", options.get("workers", level), level, why)


def in_order(requests: Iterable[Request]) -> Iterator[Request]:
    """The requests by arrival, as one queue: `next` on it is safe from several threads."""
    lock, waiting = threading.Lock(), iter(sorted(requests, key=lambda r: r.arrival_s))

    def take() -> Request | None:
        with lock:
            return next(waiting, None)

    return iter(take, None)


def wait_for_arrival(
    request: Request, recorder: Recorder, cancel: threading.Event | None = None
) -> None:
    """Sleep until the request has arrived; raises Cancelled when the run ends before."""
    while (left := request.arrival_s - recorder.now()) > 0:
        if cancel is not None and cancel.wait(min(left, SLEEP_S)):
            raise Cancelled
        if cancel is None:
            time.sleep(min(left, SLEEP_S))


def stepper(cancel: threading.Event, on_step: Callable | None) -> Callable[[], None]:
    """What a decoding loop calls after each token: it ends the loop when the run is cancelled."""

    def step() -> None:
        if cancel.is_set():
            raise Cancelled
        if on_step:
            on_step()

    return step


class Gate:
    """Where `workers` threads meet before the clock starts; it opens when all are there."""

    def __init__(self, workers: int, cancel: threading.Event):
        self._workers, self._cancel = workers, cancel
        self._arrived, self._opened = threading.Semaphore(0), threading.Event()

    def enter(self) -> None:
        """A worker is ready: wait until the gate opens. Raises Cancelled when the run ends."""
        self._arrived.release()
        while not self._opened.wait(SLEEP_S):
            self._check()

    def wait_for_all(self) -> None:
        """Wait until every worker is at the gate. Raises Cancelled when the run ends."""
        for _ in range(self._workers):
            while not self._arrived.acquire(timeout=SLEEP_S):
                self._check()

    def open(self) -> None:
        """Let all through."""
        self._opened.set()

    def _check(self) -> None:
        if self._cancel.is_set():
            raise Cancelled


def run_threads(works: Sequence[Callable[[], None]], cancel: threading.Event) -> None:
    """Run each in a thread of its own and wait for all.

    The first error, or Ctrl-C here, sets `cancel`; it is raised when every thread has ended.
    """
    errors: list[BaseException] = []
    ended = threading.Semaphore(0)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Cancelled:
            pass
        except BaseException as error:  # carried over to the caller's thread
            errors.append(error)
            cancel.set()
        finally:
            ended.release()

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for _ in threads:
            while not ended.acquire(timeout=0.2):  # Windows cannot interrupt a wait without limit
                pass
    except BaseException:
        cancel.set()
        raise
    finally:  # not before: where Ctrl-C ends a join, Python 3.11 takes the thread for ended
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]


@contextmanager
def gil_watch() -> Iterator[dict]:
    """Measure how much threads waited for the interpreter lock, if gilknocker is installed.

    The dictionary gets `contention`, the share of knocks at which the lock was not free (0 to 1),
    or `unavailable` with the reason.
    """
    found: dict = {}
    try:
        import gilknocker
    except ImportError:
        found["unavailable"] = "gilknocker is not installed (it is the optional extra `gil`)"
        yield found
        return
    knocker = gilknocker.KnockKnock(
        polling_interval_micros=1_000, sampling_interval_micros=10_000, sleeping_interval_micros=1
    )
    knocker.start()
    try:
        yield found
    finally:
        found["contention"] = knocker.contention_metric
        knocker.stop()


def interpreter() -> dict:
    """Facts of this interpreter that decide how threads share it."""
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()  # before 3.13 there is always one
    return {
        "python": sys.version.split()[0],
        "gil_enabled": enabled,
        "switch_interval_s": sys.getswitchinterval(),
    }
