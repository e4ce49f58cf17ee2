"""N processes, each with its own model: the publication's "Multiprocessing Inference"."""

from collections.abc import Mapping

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import served, strategy
from llmperf.strategies.strategy import Strategy, at_most, choice, in_words

_workers = at_most("workers")


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """The server with one row: each process takes the next request until none is left.

    Options: `workers` (default: a process for each request), `weights` (`own`, or on the CPU
    `shared`: all map one copy), `loop`. Each has floor(cores / workers) threads of the processor.
    """
    weights = options.get("weights", "own")
    processes = _workers(len(workload.requests), options)
    trace = served.run(model, workload, options, processes=processes, rows=1, weights=weights)
    trace.notes.update(weights=weights, mps_daemon=served.mps_daemon())
    return trace


def ready(model: Model, level: int, options: Mapping) -> list[int]:
    """Have the processes of a run loaded; the ids of those that it will not use."""
    return served.ready(model, _workers(level, options), options.get("weights", "own"))


def _refuse(model: Model, level: int, options: Mapping) -> None:
    weights = options.get("weights", "own")
    if weights == "shared" and model.device != "cpu":
        raise ValueError(
            f"shared weights are for the cpu, and the model is on {model.device}: each process"
            " needs its own there, so leave weights at own"
        )
    served.check_memory(model, _workers(level, options), weights)


STRATEGY = Strategy(
    "processes",
    run,
    in_words("{level} processes", "workers", "weights", single="1 process"),
    style=2,
    options={"workers": strategy.workers, "weights": choice("own", "shared")},
    refuse=_refuse,
    ready=ready,
    processes=_workers,
    checks_memory=True,
)
