"""Prefill and decode times: once as the bound, once as expected from this machine's own rates."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmperf.models.tensors import ModelShape
from llmperf.predict import costs
from llmperf.predict.costs import Cost
from llmperf.predict.roofline import PYTHON, Bound, bound

JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate and up", "up": "gate and up"}


@dataclass(frozen=True)
class Latency:
    """Bounds of prefill and of one decode step, and what is expected; seconds.

    The expected times are None where the rates of the matrix products were not given.
    """

    prefill: Bound
    decode: Bound
    expected_prefill_s: float | None
    expected_decode_s: float | None
    limit: str  # of a decode step: bandwidth, arithmetic, launches or Python


def latency(
    shape: ModelShape,
    dtype: str,
    quantization: str | None = None,
    batch: int = 1,
    prompt_tokens: int = 32,
    context: int | None = None,
    ceilings: Mapping | None = None,
    loop: str = "cached",
    rates: Iterable[Mapping] | None = None,
    between_s: float | None = None,
    python_s: float | None = None,
) -> Latency:
    """Times of a prefill of `prompt_tokens` and of one decode step after `context` tokens.

    `ceilings` is what `ceilings.measure` returns, or a mapping of the same form. `rates`, from
    `ceilings.matmul_rates` over `matmul_shapes(shape)`, gives the expectation as well; its batches
    are rows, so that of a prefill is batch x prompt_tokens. `between_s` is the measured time of a
    step that is no product; without it, that is expected at its bound. `python_s` is the measured
    time that the processor works on one step. Raises ValueError when a ceiling is missing.
    """
    if ceilings is None:
        raise ValueError("latency needs ceilings: those of ceilings.measure(), or a card's")
    context = prompt_tokens if context is None else context
    bandwidth = _median(ceilings.get("read_bytes_per_s"))
    flops = _median((ceilings.get("flops_per_s") or {}).get(dtype))
    if bandwidth is None:
        raise ValueError("the ceilings have no read_bytes_per_s: measure it first")
    launched = launches(shape) * (_median((ceilings.get("launch_s") or {}).get("drained")) or 0)
    if loop == "compiled":
        launched = 0.0  # one graph a step
    prefill = costs.forward(shape, dtype, batch, prompt_tokens, 0, quantization)
    if loop == "recompute":
        seen = min(costs.WINDOW, context + 1)
        step = costs.forward(shape, dtype, batch, seen, 0, quantization, False, logits=seen)
        new = seen
    else:
        step, new = costs.forward(shape, dtype, batch, 1, context, quantization), 1
    least = bound(step, bandwidth, flops, launched)
    times = list(rates or ())
    limits = (times, bandwidth, flops, launched, quantization)
    expected_prefill = expected_s(shape, dtype, batch * prompt_tokens, prefill, *limits)
    expected = expected_s(shape, dtype, batch * new, step, *limits, between_s)
    slow = python_s is not None and python_s > max(least.seconds, expected or 0.0)
    limit = PYTHON if slow else least.limit
    start = bound(prefill, bandwidth, flops, launched)
    return Latency(start, least, expected_prefill, expected, limit)


def expected_s(
    shape: ModelShape,
    dtype: str,
    rows: int,
    cost: Cost,
    rates: Iterable[Mapping],
    bandwidth_bytes_s: float,
    flops_s: float | None,
    launched_s: float = 0.0,
    quantization: str | None = None,
    between_s: float | None = None,
) -> float | None:
    """Seconds of a forward pass from measured matrix products: each as often as the model has it.

    What is no product with a weight (the cache, attention) is `between_s`, or its bound. None when
    the rates lack one of the products at that number of rows, both joined and apart.
    """
    seconds = {
        (r["n"], r["k"]): _median(r["seconds"])
        for r in rates
        if r["batch"] == rows and r["dtype"] == dtype
    }
    ways = (matmul_shapes(shape, joined) for joined in (True, False))
    products = next((way for way in ways if way.keys() <= seconds.keys()), None)
    if products is None:
        return None
    total = sum(times * seconds[product] for product, times in products.items())
    weights = costs.weights_read(shape, dtype, quantization)
    weight_flops = rows * (costs.linear_flops(shape) + 2 * shape.vocab * shape.hidden)
    rest = Cost(max(0.0, cost.bytes - weights), max(0.0, cost.flops - weight_flops))
    if between_s is None:
        between_s = bound(rest, bandwidth_bytes_s, flops_s).seconds
    return max(total + between_s, launched_s)


def matmul_shapes(shape: ModelShape, joined: bool = False) -> Counter:
    """The weights that a token meets, as (out, in) with how many of each; the head included.

    `joined`: query, key and value as one, and gate and up, as where they are multiplied together.
    """
    found: Counter = Counter({(shape.vocab, shape.hidden): 1})
    together: Counter = Counter()
    for t in shape.tensors():
        layer, _, name = t.name.rpartition(".")
        if t.kind == "linear" and joined and name in JOINED:
            together[layer, JOINED[name], t.columns] += t.rows
        elif t.kind in ("linear", "router"):
            found[(t.rows, t.columns)] += 1
        elif t.kind == "expert":
            found[(t.rows, t.columns)] += shape.moe.per_token
    for (_, _, columns), rows in together.items():
        found[(rows, columns)] += 1
    return found


def launches(shape: ModelShape) -> int:
    """Kernels of one eager step at least: products, norms, and a layer's attention, activation,
    two residual sums and, with rotary positions, two rotations."""
    products = sum(matmul_shapes(shape).values())
    norms = sum(t.kind == "norm" for t in shape.tensors())
    return products + norms + shape.layers * (4 if shape.learned_positions else 6)


def card_ceilings(card) -> dict:
    """A card's data sheet in the form of `ceilings.measure`; launches and other dtypes unknown."""
    flops = card.fp16_flops_s
    known = None if flops is None else {"median": flops}
    return {
        "read_bytes_per_s": card.bandwidth_bytes_s and {"median": card.bandwidth_bytes_s},
        "flops_per_s": {"fp16": known, "bf16": known},
    }


def _median(value) -> float | None:
    """A plain number, or the median of a measured figure."""
    return value.get("median") if isinstance(value, Mapping) else value
