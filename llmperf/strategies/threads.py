"""N threads, one model: the publication's "Multithreading Inference"."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared, strategy
from llmperf.strategies.strategy import Strategy, at_most, choice, count, in_words

STREAMS = ("default", "own")


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Each thread takes the next request until none is left; all start together.

    Options: `workers` (default: a thread for each request), `intra_op` (threads that one operator
    may use, per worker, on the CPU; default: what torch has now), `stream` (`default`, shared by
    all as published, or `own` on a GPU), `loop`, `on_step`.
    """
    import torch

    workers = options.get("workers", len(workload.requests))
    intra_op = options.get("intra_op", torch.get_num_threads())
    job = _Job(model, workload, options, workers, intra_op)
    with _intra_op_restored(), shared.gil_watch() as gil:
        shared.run_threads([job.begin, *(job.worker(i) for i in range(workers))], job.cancel)
        _synchronize(model)
        trace = job.recorder.trace()
    trace.notes.update(
        workers=[job.seen[i] for i in sorted(job.seen)],
        intra_op_threads=intra_op if model.device == "cpu" else None,
        stream=options.get("stream", "default") if model.device != "cpu" else None,
        gil=gil,
        interpreter=shared.interpreter(),
    )
    return trace


class _Job:
    """One run: the queue that the threads share, and when they may begin."""

    def __init__(self, model, workload, options, workers, intra_op):
        self.model, self.workload, self.options = model, workload, options
        self.intra_op = intra_op
        self.cancel = threading.Event()
        self.seen: dict[int, dict] = {}
        self.recorder: Recorder | None = None
        self._gate = shared.Gate(workers, self.cancel)
        self._queue = shared.in_order(workload.requests)

    def begin(self) -> None:
        """When every thread is there, the clock starts."""
        self._gate.wait_for_all()
        self.recorder = Recorder(self.workload.requests)
        self._gate.open()

    def worker(self, i: int):
        """The work of thread `i`, as a function without arguments."""

        def work() -> None:
            import torch

            # OpenMP keeps this number per thread, so that it is set here and not once for all.
            torch.set_num_threads(self.intra_op)
            with _stream(self.model, self.options.get("stream", "default")):
                self._gate.enter()
                wall, cpu, done = time.perf_counter(), time.thread_time(), 0
                for request in self._queue:
                    self.one(request, str(i))
                    done += 1
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            self.seen[i] = {"worker": str(i), "requests": done, "wall_s": wall, "cpu_s": cpu}

        return work

    def one(self, request, label: str) -> None:
        """Answer one request once it has arrived."""
        shared.wait_for_arrival(request, self.recorder, self.cancel)
        decoding.run(
            self.model,
            [request],
            self.recorder,
            loop=self.options.get("loop", "cached"),
            sampling=self.workload.sampling,
            stop=self.workload.stop,
            worker=label,
            on_step=shared.stepper(self.cancel, self.options.get("on_step")),
        )


@contextmanager
def _intra_op_restored() -> Iterator[None]:
    """A thread's setting becomes the default of later threads: put the old one back."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(model: Model, kind: str):
    """This thread's stream. A new one first waits for what the default stream still has to do."""
    if kind == "default":
        return nullcontext()
    import torch

    stream = torch.cuda.Stream(model.torch_device)
    stream.wait_stream(torch.cuda.default_stream(model.torch_device))
    return torch.cuda.stream(stream)


def _synchronize(model: Model) -> None:
    """Wait until every stream of the device has ended: only then the clock may be read."""
    if model.device != "cpu":
        import torch

        torch.cuda.synchronize(model.torch_device)


def _refuse(model: Model, level: int, options: Mapping) -> None:
    if "intra_op" in options and model.device != "cpu":
        raise ValueError(
            f"intra_op sets threads of the processor, but the model is on {model.device}:"
            " leave it out"
        )
    if options.get("stream") == "own" and model.device == "cpu":
        raise ValueError("a stream of its own needs a CUDA GPU, and the model is on the cpu")


STRATEGY = Strategy(
    "threads",
    run,
    in_words("{level} threads", "workers", "intra_op", "stream"),
    style=1,
    options={"workers": strategy.workers, "intra_op": count, "stream": choice(*STREAMS)},
    refuse=_refuse,
    threads=at_most("workers"),
)
