"""N threads, one model: the publication's "Multithreading Inference"."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache

import torch

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.machine import PROBES, SLICE_S
from llmperf.models import Model
from llmperf.strategies import run_control
from llmperf.strategies.strategy import COUNT, Strategy, capped_by_level, choice, in_words

try:
    import gilknocker
except ImportError:
    gilknocker = None


NOT_WATCHED = {"unavailable": "the lock was not watched in this run, since that makes it slower"}


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Each thread takes the next request until none is left; all start together.

    Options: `workers` (default: a thread for each request), `intra_op` (threads that one operator
    may use, per worker, on the CPU; default: what torch has now), `stream` (`default`, one stream
    for all as published, or `own` on a GPU), `loop`, `on_step`, `watch` (see `gil_watch`).
    """
    workers = options.get("workers", len(workload.requests))
    intra_op = options.get("intra_op", torch.get_num_threads())
    stream = options["stream"]
    queue, cancel = run_control.in_order(workload.requests), threading.Event()
    how = run_control.decode_arguments(workload, options, cancel)
    clock: list[Recorder] = []
    seen: dict[int, dict] = {}

    start = threading.Barrier(workers, lambda: clock.append(Recorder(workload.requests)))

    def work(i: int) -> None:
        torch.set_num_threads(intra_op)  # OpenMP keeps this number per thread
        with _on_stream(model, i, stream):
            start.wait()
            cpu = time.thread_time()
            for request in queue:
                run_control.wait_for_arrival(request, clock[0], cancel)
                decoding.run(model, [request], clock[0], worker=str(i), **how)
        seen[i] = {"worker": str(i), "cpu_s": time.thread_time() - cpu}

    before = torch.get_num_threads()
    try:
        with gil_watch() if options.get("watch") else nullcontext(NOT_WATCHED) as gil:
            _run_all(work, workers, cancel, start)
            if model.device != "cpu":
                torch.cuda.synchronize(model.torch_device)
            trace = clock[0].trace()
    finally:
        torch.set_num_threads(before)  # a thread's setting becomes the default of later threads
    trace.notes.update(
        workers=[seen[i] for i in sorted(seen)],
        intra_op_threads=intra_op if model.device == "cpu" else None,
        stream=stream if model.device != "cpu" else None,
        gil=gil,
        interpreter={name: PROBES[name]() for name in ("python", "gil_enabled")},
    )
    return trace


def _run_all(work: Callable, n: int, cancel: threading.Event, start: threading.Barrier) -> None:
    """Run `work(i)` in `n` threads. The first error, or Ctrl-C here, cancels the others; it is
    raised when every thread has ended."""
    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(work, i) for i in range(n)]
        try:
            while wait(futures, SLICE_S, FIRST_EXCEPTION).not_done:
                if any(f.done() and f.exception() for f in futures):
                    break
        finally:
            if not all(f.done() and not f.exception() for f in futures):
                cancel.set()
                start.abort()
    errors = [error for f in futures if (error := f.exception())]
    ended = (run_control.Cancelled, threading.BrokenBarrierError)
    if errors:
        raise next((e for e in errors if not isinstance(e, ended)), errors[0])


@contextmanager
def gil_watch() -> Iterator[dict]:
    """Measure how much threads waited for the interpreter lock, if gilknocker is installed.

    Its thousand knocks a second take time from the threads: on two cores two threads took 1.4
    times as long.
    The dictionary gets `contention`, the share of knocks at which the lock was not free (0 to 1),
    or `unavailable` with the reason.
    """
    found: dict = {}
    if gilknocker is None:
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


@cache
def _stream(device: str, worker: int):
    """One stream a worker for all runs: torch keeps a cuBLAS workspace for each it has seen."""
    return torch.cuda.Stream(device)


def _on_stream(model: Model, worker: int, kind: str):
    """This thread's stream; its own one first waits for what the default stream still has to do."""
    if kind == "default":
        return nullcontext()
    stream = _stream(str(model.torch_device), worker)
    stream.wait_stream(torch.cuda.default_stream(model.torch_device))
    return torch.cuda.stream(stream)


def _refuse(model: Model, level: int, options: Mapping) -> None:
    if "intra_op" in options and model.device != "cpu":
        raise ValueError(f"intra_op is for the cpu: leave it out on {model.device}")
    if options["stream"] == "own" and model.device == "cpu":
        raise ValueError("a stream of its own needs a CUDA GPU, and the model is on the cpu")


_workers = capped_by_level("workers")
STRATEGY = Strategy(
    "threads",
    run,
    in_words("{n} threads", "intra_op", "stream", single="1 thread", count=_workers),
    style=1,
    options={
        "workers": COUNT,
        "intra_op": COUNT,
        "stream": choice("default", "own"),
        "watch": (lambda v: v is True, "true"),
    },
    defaults={"stream": "default"},
    refuse=_refuse,
    threads=_workers,
    streams=lambda level, o: _workers(level, o) if o.get("stream") == "own" else 1,
)
