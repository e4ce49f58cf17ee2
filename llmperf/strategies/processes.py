"""N processes, each with its own model: the publication's "Multiprocessing Inference"."""

from collections.abc import Mapping

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.machine import PROBES, ask
from llmperf.models import Model
from llmperf.strategies import served
from llmperf.strategies.strategy import COUNT, Strategy, capped_by_level, choice, in_words

_workers = capped_by_level("workers")


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """The server with one row: each process takes the next request until none is left.

    Options: `workers` (default: a process for each request), `weights` (`own`, or on the CPU
    `shared`: all map one copy), `loop`. Each has floor(cores / workers) threads of the processor.
    """
    how = {"rows": 1, "window_s": 0.0} | {k: v for k, v in options.items() if k != "workers"}
    trace = served.run(model, workload, _workers(len(workload.requests), options), **how)
    running, why = ask(PROBES["mps_daemon"])  # NVIDIA's Multi-Process Service
    mps = running if why is None else {"unavailable": why}
    trace.notes.update(weights=options["weights"], mps_daemon=mps)
    return trace


def _refuse(model: Model, level: int, options: Mapping) -> None:
    if options["weights"] == "shared" and model.device != "cpu":
        raise ValueError(f"shared weights are for the cpu: leave weights at own on {model.device}")
    if options["weights"] == "shared" and model.quantization:
        raise ValueError(f"weights in {model.quantization} cannot be shared: leave weights at own")


STRATEGY = Strategy(
    "processes",
    run,
    in_words("{n} processes", "weights", single="1 process", count=_workers),
    style=2,
    options={"workers": COUNT, "weights": choice("own", "shared")},
    defaults={"weights": "own"},
    refuse=_refuse,
    processes=_workers,
    served=True,
)
