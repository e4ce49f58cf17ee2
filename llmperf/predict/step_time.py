"""Prefill and decode times: once as the bound, once as expected from this machine's own rates."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmperf.decoding.requests import WINDOW
from llmperf.models import ModelShape
from llmperf.predict import costs
from llmperf.predict.costs import Cost
from llmperf.predict.roofline import PYTHON, Bound, bound
from llmperf.predict.sizes import weights_read
from llmperf.predict.spec import RunSpec

JOINED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}


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
    spec: RunSpec,
    ceilings: Mapping,
    *,
    context: int | None = None,
    rates: Iterable[Mapping] | None = None,
    between_s: float | None = None,
    python_s: float | None = None,
) -> Latency:
    """Times of the prefill and of one decode step after `context` tokens (default: the prompt).

    `ceilings` is what `ceilings.measure` returns, or a mapping of the same form. `rates`, from
    `ceilings.matmul_rates` over `matmul_shapes(shape)`, gives the expectation as well; its batches
    are rows, so that of a prefill is rows x prompt_tokens. `between_s` is the measured time of a
    step that is no product; without it, that is expected at its bound. `python_s` is the measured
    time that the processor works on one step. Raises ValueError when a ceiling is missing.
    """
    context = spec.prompt_tokens if context is None else context
    bandwidth = _median(ceilings.get("read_bytes_per_s"))
    flops = _median((ceilings.get("flops_per_s") or {}).get(spec.dtype))
    if bandwidth is None:
        raise ValueError("the ceilings have no read_bytes_per_s: measure it first")
    launch = _median((ceilings.get("launch_s") or {}).get("drained")) or 0.0
    launched = 0.0 if spec.loop == "compiled" else launches(spec.shape) * launch  # one graph
    prefill = costs.forward(spec, spec.prompt_tokens)
    new = min(WINDOW, context + 1) if spec.loop == "recompute" else 1
    step = costs.forward(spec, new, 0 if spec.loop == "recompute" else context, logits=new)
    least = bound(step, bandwidth, flops, launched)

    def expected(cost: Cost, tokens: int, other_s: float | None) -> float | None:
        products_s = _products_s(spec, rates or (), tokens)
        if products_s is None:
            return None
        if other_s is None:
            read = weights_read(spec.shape, spec.dtype, spec.quantization, tokens)
            run = tokens * (spec.shape.token_flops + costs.head_flops(spec.shape))
            other = Cost(max(0.0, cost.bytes - read), max(0.0, cost.flops - run))
            other_s = bound(other, bandwidth, flops).seconds
        return max(products_s + other_s, launched)

    rates = list(rates or ())
    expected_prefill = expected(prefill, spec.rows * spec.prompt_tokens, None)
    expected_decode = expected(step, spec.rows * new, between_s)
    slow = python_s is not None and python_s > max(least.seconds, expected_decode or 0.0)
    limit = PYTHON if slow else least.limit
    start = bound(prefill, bandwidth, flops, launched)
    return Latency(start, least, expected_prefill, expected_decode, limit)


def _products_s(spec: RunSpec, rates: Iterable[Mapping], tokens: int) -> float | None:
    """Seconds of the measured matrix products, each as often as the model has it; None when the
    rates lack one of them at that number of rows, both joined and apart."""
    seconds = {
        (r["n"], r["k"]): _median(r["seconds"])
        for r in rates
        if r["batch"] == tokens and r["dtype"] == spec.dtype
    }
    ways = (matmul_shapes(spec.shape, joined) for joined in (True, False))
    products = next((way for way in ways if way.keys() <= seconds.keys()), None)
    return products and sum(times * seconds[product] for product, times in products.items())


def matmul_shapes(shape: ModelShape, joined: bool = False) -> Counter:
    """The weights that a token meets, as (out, in) with how many of each; the head included.

    `joined`: query, key and value as one, and gate and up, as where they are multiplied together.
    """
    found: Counter = Counter({(shape.vocab, shape.hidden): 1})
    together: Counter = Counter()
    for t in shape.tensors:
        module = t.name.removesuffix(".weight").rpartition(".")
        if t.columns == 1 or t.role in ("head", "embedding", "position", "tower"):
            continue
        if t.role == "expert":
            found[t.rows, t.columns] += shape.experts_per_token * t.count / shape.experts
        elif joined and module[2] in JOINED:
            together[module[0], JOINED[module[2]], t.columns] += t.rows
        elif t.linear or t.role == "router":
            found[t.rows, t.columns] += 1
    for (_, _, columns), rows in together.items():
        found[rows, columns] += 1
    return found


def launches(shape: ModelShape) -> int:
    """Kernels of one eager step at least: products, norms, and a layer's attention, activation,
    two residual sums and, with rotary positions, two rotations."""
    products = sum(matmul_shapes(shape).values())
    norms = sum(t.role == "norm" and t.name.endswith("weight") for t in shape.tensors)
    return round(products) + norms + shape.layers * (4 if shape.learned_positions else 6)


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
