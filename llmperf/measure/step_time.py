"""How long a decode step should take: bytes and FLOPs at measured rates, operations at measured
overhead, and the draw of the next token.

eager loops on a processor   max(bound, products as torch runs them) + operations x overhead + draw
eager loops on a GPU         max(bound, operations x time of a launch) + draw
compiled on a processor      max(bound, reading and products together + the rest) + draw
compiled on a GPU            bound + draw (one graph: no launches)

Bounds are at the bandwidth of the minute. A compiled step reads weights while it multiplies
others: at best all of the shorter is hidden, at worst nothing. Expected is the share HIDDEN, the
median of four studies, 160 runs, on two cores of an AMD EPYC (quartiles 0.67 and 0.97).

Left out: elementwise work on long inputs, and on a GPU whatever keeps kernels from the memory's
bandwidth. `RANGE` says how far off a step on an idle machine may be.
"""

from collections.abc import Callable, Mapping
from functools import cache, wraps
from statistics import median
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from llmperf import decoding, predict
from llmperf.decoding.requests import Sampling
from llmperf.machine import DTYPE_BYTES, DTYPES, rates
from llmperf.measure.condition import Condition
from llmperf.models import CHECKPOINT, Model, quantize

RANGE = (0.75, 1.5)  # measured over what is expected at best, and at worst
HIDDEN = 0.8
TINY = 16  # width of the tensors on which the overhead of an operation is measured


def expected(
    condition: Condition, spec: predict.RunSpec, bound: predict.Bound, limits: Mapping
) -> dict:
    """`expected_tpot_ms`, its range, and `limit`: Python or launches where operations take longest;
    None with a reason for engines and weights whose step is not this sum."""
    m, rows = condition.model, condition.rows_per_step
    if condition.runner.foreign:
        return {"expected_tpot_ms": None, "expected_reason": "the engine has its own step"}
    if m.shape.quantization or str(m.quantization).startswith(CHECKPOINT):
        return {"expected_tpot_ms": None, "expected_reason": "its kernels are not ours to time"}
    on_cpu, launch_s = m.device == "cpu", limits["launch_s"]["drained"]["median"]
    operations_s = 0.0
    low_s = high_s = bound_s = bound.seconds
    if spec.loop == "compiled":
        if on_cpu:
            multiply_s, rest_s = arithmetic_s(m, rows, spec.prompt_tokens)
            read_s = bound.bytes / limits["read_bytes_per_s"]["median"]
            low_s = max(bound_s, rest_s + max(read_s, multiply_s))
            high_s = max(bound_s, rest_s + read_s + multiply_s)
    elif on_cpu:
        seen = min(predict.WINDOW, spec.prompt_tokens + spec.new_tokens // 2 + 1)
        new = 1 if spec.loop == "cached" else seen
        low_s = high_s = max(bound_s, products_s(m.shape, m.dtype, m.quantization, rows * new))
        operations_s = operations(m) * operation_s()
    else:
        operations_s = operations(m) * launch_s
        low_s = high_s = max(0.0, bound_s - operations_s)  # kernels run while the next are launched
    draw_s = sampling_s(m, spec.loop, rows, condition.sampling)
    low, high = ((x + operations_s + draw_s) * 1e3 for x in (low_s, high_s))
    found = {"expected_low_ms": RANGE[0] * low, "expected_high_ms": RANGE[1] * high}
    if operations_s > max(high_s, bound_s):
        found["limit"] = "Python" if on_cpu else "launches"
    return {"expected_tpot_ms": low + (1 - HIDDEN) * (high - low), **found}


def once_a_model(measured: Callable) -> Callable:
    """Keep each result of `measured(model, *rest)` as long as the model's module lives."""
    known: WeakKeyDictionary = WeakKeyDictionary()  # module → rest → result

    @wraps(measured)
    def kept(model: Model, *rest):
        results = known.setdefault(model.module, {})
        if rest not in results:
            results[rest] = measured(model, *rest)
        return results[rest]

    return kept


@once_a_model
def arithmetic_s(model: Model, rows: int, position: int) -> tuple[float, float]:
    """Seconds of the matrix products of a compiled step on a processor, and of all the rest of it,
    without reading the weights from memory.

    Every layer reads the first one's weights. The output layer is added by its share of them, as
    if it had their kind; in int4 it has 8 bits.
    """
    step = decoding.prepare(model, "compiled").step
    head = model.shape.vocab * model.shape.hidden
    layers = predict.weights_read(model.shape, model.dtype) / DTYPE_BYTES[model.dtype] - head
    whole, rest = (median(step.first_layer_seconds(rows, position, p)) for p in (True, False))
    return max(0.0, whole - rest) * (1 + head / layers), rest


@cache
def products_s(shape, dtype: str, quantization: str | None, rows: int) -> float:
    """Seconds of all matrix products of a step as torch runs them, weights read from memory."""
    counts = predict.matmul_shapes(shape)
    head = shape.vocab, shape.hidden

    def product(weight):
        word = quantize.word_of_head(quantization) if weight.shape == head else quantization
        return quantize.layer(weight, word) if word else lambda x: linear(x, weight)

    seconds = rates.matmul_seconds(list(counts), dtype, rows, product)
    return sum(times * seconds[weight] for weight, times in counts.items())


class _Counter(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


@once_a_model
def operations(model: Model) -> int:
    """Operations that one eager step of the module hands to torch, views included."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.torch_device)
    with torch.inference_mode(), _Counter() as counter:
        model.module(input_ids=ids, use_cache=True, logits_to_keep=1)
    return counter.seen


@cache
def operation_s() -> float:
    """Seconds that one small eager operation keeps the processor, Python included."""
    layer = torch.nn.Sequential(torch.nn.Linear(TINY, TINY), torch.nn.SiLU(), torch.nn.Identity())
    x = torch.zeros(1, TINY)

    def run() -> None:
        y = x
        for _ in range(100):
            y = layer(y) + x

    with torch.inference_mode():
        return median(rates.seconds_of(run, lambda: None, 9)) / 300  # linear, SiLU and the sum


@once_a_model
def sampling_s(model: Model, loop: str, rows: int, sampling: Sampling) -> float:
    """Median seconds from logits (rows, vocabulary) to tokens that the processor can read."""
    draw, device = decoding.prepare(model, loop).next_tokens, model.torch_device
    plain = loop == "compiled" and model.device == "cpu"  # its logits are fp32
    dtype = torch.float32 if plain else getattr(torch, DTYPES[model.dtype])
    logits = torch.randn(rows, model.shape.vocab, device=device).to(dtype)
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    run = lambda: draw(logits, sampling, uniform)  # noqa: E731
    return median(rates.seconds_of(run, rates.waiter(model.device), 9))
