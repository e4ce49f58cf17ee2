"""N processes, each with a model of its own: the publication's "Multiprocessing Inference"."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from llmperf import machine, predict
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.machine.probes import PROBES
from llmperf.machine.run_tool import ask
from llmperf.models import Model
from llmperf.strategies import shared, strategy
from llmperf.strategies.pool import Pool
from llmperf.strategies.strategy import Strategy, at_most, choice, in_words

_pool: Pool | None = None  # at most one, alive from run to run inside a `session`
_sessions = 0


def check_memory(
    model: Model, workers: int, weights: str = "own", free_bytes: int | None = None
) -> None:
    """Raise ValueError, with the arithmetic, when that many processes cannot fit what is free.

    The low bounds count, so that what is refused surely does not fit. `free_bytes` is asked of the
    machine when it is not given; memory that this module's own pool holds counts as free.
    """
    cpu = model.device == "cpu"
    system = "cpu" if cpu else PROBES["os"]().lower()
    platform = system if system in ("cpu", "windows", "wsl2") else "linux"
    how = {"dtype": model.dtype, "quantization": model.quantization, "platform": platform}
    one = predict.memory(model.shape, **how, strategy="processes", workers=1, idle_bytes=0)
    weights_bytes = one.line("weights").low
    rest = one.low - weights_bytes
    copies = 1 if weights == "shared" else workers
    need = copies * weights_bytes + workers * rest
    free = _free_bytes(cpu, one.low) if free_bytes is None else free_bytes
    if need > free:
        each = rest if weights == "shared" else rest + weights_bytes
        once = weights_bytes if weights == "shared" else 0
        gib = predict.GIB
        raise ValueError(
            f"{workers} processes need at least {copies} x {weights_bytes / gib:.2f} GiB of weights"
            f" + {workers} x {rest / gib:.2f} GiB for each process = {need / gib:.2f} GiB, and"
            f" {free / gib:.2f} GiB are free: use at most {max(0, (free - once) // each)}"
        )


def _free_bytes(cpu: bool, each: int) -> int:
    held = each * len(_pool.workers) if _pool else 0
    if cpu:
        import psutil

        return psutil.virtual_memory().available + held
    import torch

    return torch.cuda.mem_get_info()[0] + held


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """Each process takes the next request until none is left; all start together, loaded before.

    Options: `workers` (default: a process for each request), `weights` (`own`, or on the CPU
    `shared`: all map one copy), `loop`. Each has floor(cores / workers) threads of the processor.
    Raises WorkerDied, a RuntimeError, when a worker dies, fails or hangs; all are ended then.
    """
    workers = options.get("workers", len(workload.requests))
    with session():
        try:
            ready(model, len(workload.requests), options)
            return _answered(_pool, workload, workers, options)
        except BaseException:
            _close()
            raise


@contextmanager
def session() -> Iterator[None]:
    """Inside, workers stay alive from run to run; on leaving the outermost they are ended."""
    global _sessions
    _sessions += 1
    try:
        yield
    finally:
        _sessions -= 1
        if not _sessions:
            _close()


def ready(model: Model, level: int, options: Mapping) -> list[int]:
    """Have the workers of this condition loaded; the process ids of those that it will not use.

    Idle workers on the CPU only wait, and the memory sampler leaves them out. On a GPU each holds
    a context that the device level counts, so there they are ended.
    """
    global _pool
    is_shared = options.get("weights") == "shared"
    workers = options.get("workers", level)
    if _pool and (_pool.source, _pool.shared) != (model.source, is_shared):
        _close()
    _pool = _pool or Pool(model, is_shared)
    if model.device != "cpu":
        _pool.shrink(workers)
    try:
        _pool.grow(workers)
    except BaseException:
        _close()
        raise
    return [worker.process.pid for worker in _pool.workers[workers:]]


def rest(model: Model) -> list[int]:
    """Before a run of another strategy: as `ready` with no worker at all."""
    if _pool and model.device != "cpu":
        _close()
    return [worker.process.pid for worker in _pool.workers] if _pool else []


def _close() -> None:
    global _pool
    if _pool:
        _pool.close()
    _pool = None


@cache
def _cores() -> int:
    return machine.cores(machine.describe())


def _answered(pool: Pool, workload: Workload, workers: int, options: Mapping) -> Trace:
    intra_op = max(1, _cores() // workers)
    how = {
        "intra_op": intra_op,
        "loop": options.get("loop", "cached"),
        "sampling": workload.sampling,
        "stop": workload.stop,
    }
    # The barrier: every worker has answered, so all are alive and wait for a request.
    pool.ask(workers, "begin", lambda worker: {**how, "worker": str(worker.place)})
    trace, counts = _drive(pool, workload, workers)
    held = pool.ask(workers, "end", lambda worker: {})
    mps, why = ask(PROBES["mps_daemon"])
    trace.notes.update(
        workers=[
            {"worker": str(w.place), "requests": counts[w.place], "load_s": w.load_s, **each}
            for w, each in zip(pool.workers, held, strict=False)
        ],
        intra_op_threads=intra_op,
        weights=options.get("weights", "own"),
        mps_daemon=mps if why is None else {"unavailable": why},
    )
    return trace


def _drive(pool: Pool, workload: Workload, workers: int) -> tuple[Trace, list[int]]:
    """Hand out the requests and merge what comes back; the clock stops when the last is in."""
    waiting = deque(shared.in_order(workload.requests))
    free, busy = deque(pool.workers[:workers]), set()
    counts = [0] * workers
    recorder = Recorder(workload.requests)
    while waiting or busy:
        while waiting and free and waiting[0].arrival_s <= recorder.now():
            worker = free.popleft()
            worker.send("request", request=waiting.popleft())
            busy.add(worker)
        until = waiting[0].arrival_s - recorder.now() if waiting and free else 0.2
        message = pool.hear(busy, min(until, 0.2))
        if message and message[1] == "request":
            worker, _, (rows, origin) = message
            recorder.merge(rows, origin)
            counts[worker.place] += 1
            busy.discard(worker)
            free.append(worker)
    return recorder.trace(), counts


def _refuse(model: Model, level: int, options: Mapping) -> None:
    weights = options.get("weights", "own")
    if weights == "shared" and model.device != "cpu":
        raise ValueError(
            f"shared weights are for the cpu, and the model is on {model.device}: each process"
            " needs its own there, so leave weights at own"
        )
    check_memory(model, options.get("workers", level), weights)


STRATEGY = Strategy(
    "processes",
    run,
    in_words("{level} processes", "workers", "weights"),
    style=2,
    options={"workers": strategy.workers, "weights": choice("own", "shared")},
    refuse=_refuse,
    processes=at_most("workers"),
    checks_memory=True,
)
