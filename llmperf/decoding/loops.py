"""Which decoding loop runs: decided here alone, and said in the trace.

`recompute` is the published loop, `cached` keeps keys and values, `compiled` runs a step without
Python between its operations: plain C on a CPU, a CUDA graph on a GPU. `cached` and `compiled`
agree up to rounding; `recompute` agrees too, as long as a text fits in its window of 200 tokens.
"""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmperf.decoding import cpu_step, graph_step, sampling
from llmperf.decoding.batch import Piece
from llmperf.decoding.requests import DEFAULT_LOOP, LOOPS
from llmperf.machine import first_line

CHECK_TOKENS = 48  # at least; a model with windows is checked past its window
MOST_CHECK_TOKENS = 1024
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}  # of the logits' norm, compiled to eager
QUANTISED_TOLERANCE = 5e-3  # at least: inputs of int8 and int4 weights are rounded to 16 bits
_chosen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # module → Prepared of `compiled`
_lock = threading.RLock()


@dataclass(frozen=True)
class Prepared:
    """The loop that runs, why it is not the one asked for (or slower than it could be), and what
    making it ready took."""

    loop: str
    reason: str | None = None
    seconds: float = 0.0
    step: cpu_step.CpuStep | graph_step.GraphStep | None = None

    @property
    def next_tokens(self) -> Callable:
        """What draws the tokens: the step itself on a CPU, else `sampling.next_tokens`."""
        return getattr(self.step, "next_tokens", sampling.next_tokens)


def check_loop(loop: str) -> None:
    """Raise ValueError for an unknown loop."""
    if loop not in LOOPS:
        raise ValueError(f"unknown loop {loop!r}: choose {', '.join(LOOPS)}")


def prepare(model, loop: str = DEFAULT_LOOP) -> Prepared:
    """Make a loop ready to run, once a model: build the compiled step and check its logits.

    A model, machine or thread that cannot run `compiled` gets `cached`, with the reason.
    """
    check_loop(loop)
    if loop != "compiled":
        return Prepared(loop)
    on_gpu = model.device != "cpu"
    if on_gpu and threading.current_thread() is not threading.main_thread():
        return Prepared("cached", "CUDA graphs work in the main thread only (pytorch#123177)")
    with _lock:  # a second thread waits instead of preparing the same again
        if model.module not in _chosen:
            _chosen[model.module] = _prepare(model, on_gpu)
        return _chosen[model.module]


def _prepare(model, on_gpu: bool) -> Prepared:
    start = time.perf_counter()
    try:
        step = _graph_step(model) if on_gpu else _cpu_step(model)
    except (cpu_step.Unsupported, RuntimeError, AttributeError, TypeError) as error:
        word = "" if isinstance(error, cpu_step.Unsupported) else f"{type(error).__name__}: "
        return Prepared("cached", word + first_line(error), time.perf_counter() - start)
    not_fused = getattr(step, "not_fused", None)
    return Prepared("compiled", not_fused, time.perf_counter() - start, step)


def _graph_step(model) -> graph_step.GraphStep:
    """The graph step, checked on a prompt of three tokens and two steps. Fused by Triton if that
    works, else plain: Triton may be installed without the C compiler that it needs."""
    if reason := graph_step.obstacle(model.module):
        raise cpu_step.Unsupported(reason)
    step = graph_step.GraphStep(model)
    calls = [[Piece(0, (1, 2, 3), 0, True)], [Piece(0, (4,), 3, True)], [Piece(0, (5,), 4, True)]]
    try:
        _check(model, graph_step.GraphRows(step, 1, 5), calls)
        return step
    except Exception as error:  # what Triton, torch's compiler and the driver raise is of any kind
        step.not_fused = graph_step.NOT_FUSED.format(first_line(error))
        step.function = graph_step.forward
    step.kept.clear()  # only now: the exception held the rows with the graph of the other function
    _check(model, graph_step.GraphRows(step, 1, 5), calls)
    return step


def _cpu_step(model) -> cpu_step.CpuStep:
    """The C step, checked on a prompt and 16 single tokens, past a sliding window of up to 1008."""
    step = cpu_step.CpuStep(model)
    room = getattr(step.config, "max_position_embeddings", MOST_CHECK_TOKENS)
    window = getattr(step.config, "sliding_window", None) or 0
    count = min(room, max(CHECK_TOKENS, min(window + 16, MOST_CHECK_TOKENS)))
    vocabulary = step.description.vocabulary
    ids = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [Piece(1, (id,), place, True) for place, id in enumerate(ids)]
    calls = [pieces[:-16], *([piece] for piece in pieces[-16:])]
    _check(model, cpu_step.CpuRows(step, 2, count), calls)
    return step


def _check(model, rows: cpu_step.CpuRows | graph_step.GraphRows, calls: list[list[Piece]]) -> None:
    """Raise Unsupported when the logits of a text, run call by call, are too far from eager ones.

    fp32 is judged by its worst position, other dtypes by the median: rounding moves single ones.
    """
    pieces = [piece for call in calls for piece in call]
    ids = torch.tensor([[id for piece in pieces for id in piece.ids]], device=model.torch_device)
    with torch.no_grad():
        logits = model.module(ids, use_cache=False).logits[0].float()
        found = torch.cat([rows.forward(call) for call in calls]).float()
    expected = logits[[piece.end - 1 for piece in pieces]]  # (pieces, vocabulary)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    error = (errors.max() if model.dtype == "fp32" else errors.median()).item()
    lowest = QUANTISED_TOLERANCE if model.quantization else 0.0
    if not error <= max(TOLERANCE[model.dtype], lowest):
        raise cpu_step.Unsupported(f"its logits differ from the eager ones by {error:.1%}")
