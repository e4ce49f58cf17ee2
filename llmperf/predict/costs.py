"""Work: the bytes that must move and the FLOPs that must run, at least, for a forward or a run."""

from collections import Counter
from dataclasses import dataclass

from llmperf.decoding.requests import WINDOW
from llmperf.models import ModelShape
from llmperf.predict.sizes import kv_bytes, token_bytes, weights_read
from llmperf.predict.spec import RunSpec


@dataclass(frozen=True)
class Cost:
    """What must move and run at least. `steps` is the number of forward passes."""

    bytes: float
    flops: float
    steps: float = 1

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.steps + other.steps)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.bytes * times, self.flops * times, self.steps * times)


def attention_flops(shape: ModelShape, new: int, past: int) -> float:
    """FLOPs of causal attention for `new` tokens of one row after `past` cached ones."""
    windows = Counter(shape.windows)
    pairs = sum(layers * _pairs(new, past, window) for window, layers in windows.items())
    return shape.pair_flops / max(1, len(shape.windows)) * pairs


def _pairs(new: int, past: int, window: int | None) -> int:
    growing = new if window is None else max(0, min(new, window - past))
    full = growing * past + growing * (growing + 1) // 2
    return full + (new - growing) * (window or 0)


def forward(spec: RunSpec, new: int, past: int = 0, logits: int = 1) -> Cost:
    """One pass: per row `new` tokens after `past` cached ones, with logits for `logits` of them."""
    shape, rows = spec.shape, spec.rows
    moved = weights_read(shape, spec.dtype, spec.quantization, rows * new)
    if spec.loop != "recompute":
        moved += kv_bytes(shape, rows, past, spec.dtype)
        moved += rows * new * token_bytes(shape, spec.dtype)
    row = new * shape.token_flops + attention_flops(shape, new, past) + past * shape.past_flops
    return Cost(moved, rows * (row + logits * 2 * shape.vocab * shape.hidden))


def step(spec: RunSpec, context: int) -> Cost:
    """One decode step after `context` tokens; `recompute` reads its window again, as published."""
    if spec.loop != "recompute":
        return forward(spec, 1, context)
    new = min(WINDOW, context + 1)
    return forward(spec, new, logits=new)


def run_cost(spec: RunSpec) -> Cost:
    """The whole generation of one batch: the prompt, then token by token."""
    start, new = spec.prompt_tokens, spec.new_tokens
    if spec.loop == "recompute":
        return sum((step(spec, n) for n in range(start - 1, start + new - 1)), Cost(0, 0, 0))
    return sum((step(spec, n) for n in range(start, start + new - 1)), forward(spec, start))


def matmul_shapes(shape: ModelShape) -> Counter:
    """The weights that a token meets, as (out, in) with how many of each; the head included."""
    found: Counter = Counter({(shape.vocab, shape.hidden): 1})
    for t in shape.tensors:
        if t.columns == 1 or t.role in ("head", "embedding", "position", "tower"):
            continue
        if t.role == "expert":
            found[t.rows, t.columns] += shape.experts_per_token * t.count / shape.experts
        elif t.linear or t.role == "router":
            found[t.rows, t.columns] += 1
    return found
