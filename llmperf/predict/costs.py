"""Work: the bytes that must move and the FLOPs that must run, at least, for a forward or a run."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from llmperf.models.tensors import ModelShape
from llmperf.predict.sizes import dtype_bytes, kv_bytes, stored

LOOPS = ("recompute", "cached", "compiled")
WINDOW = 200  # tokens that the published loop looks back


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


@lru_cache(maxsize=64)
def weights_read(shape: ModelShape, dtype: str, quantization: str | None = None) -> float:
    """Bytes of parameters that one forward pass reads at least, whatever the batch.

    The embedding is looked up, not read through, unless it is tied and so also the head; of a
    mixture of experts at least the experts of one token are read.
    """
    total = 0.0
    for tensor, size in stored(shape, dtype, quantization):
        looked_up = tensor.kind == "position" or (
            tensor.kind == "embedding" and not shape.tied_embeddings
        )
        if not looked_up:
            total += size * _active(shape, tensor)
    return total


def _active(shape: ModelShape, tensor) -> float:
    return shape.moe.per_token / shape.moe.experts if tensor.kind == "expert" else 1


@lru_cache(maxsize=64)
def linear_flops(shape: ModelShape) -> float:
    """FLOPs of all matrix products of one token, the head left out: 2 per weight in use."""
    kinds = ("linear", "expert", "router")
    return sum(2 * t.numel * _active(shape, t) for t in shape.tensors() if t.kind in kinds)


def attention_flops(shape: ModelShape, new: int, past: int) -> float:
    """FLOPs of scores and weighted values for `new` tokens of one row after `past` cached ones.

    Causal: token i looks at past + i tokens (its own included), at no more than the window.
    """
    m = shape.mla
    width = (m.nope_dim + m.rope_dim + m.value_dim) if m else 2 * shape.head_dim
    pairs = 0
    for window, layers in Counter(shape.windows or (None,) * shape.layers).items():
        pairs += layers * _pairs(new, past, window)
    return 2.0 * shape.heads * width * pairs


def _pairs(new: int, past: int, window: int | None) -> int:
    """Sum over the new tokens of what each attends to."""
    growing = new if window is None else max(0, min(new, window - past))
    full = growing * past + growing * (growing + 1) // 2
    return full + (new - growing) * (window or 0)


def forward(
    shape: ModelShape,
    dtype: str,
    batch: int,
    new: int,
    past: int = 0,
    quantization: str | None = None,
    cache: bool = True,
    logits: int = 1,
) -> Cost:
    """One forward pass of `batch` rows: `new` tokens each after `past` cached ones.

    Counts weights once, the cache read and written, and the logits of the last `logits` tokens.
    """
    moved = weights_read(shape, dtype, quantization)
    if cache:
        moved += kv_bytes(shape, batch, past, dtype)
        moved += batch * new * shape.layers * shape.kv_elements_per_token * dtype_bytes(dtype)
    head = 2 * shape.vocab * shape.hidden * logits
    row = new * linear_flops(shape) + attention_flops(shape, new, past) + head
    return Cost(moved, batch * row)


def run(
    shape: ModelShape,
    dtype: str,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    loop: str = "cached",
    quantization: str | None = None,
    window: int = WINDOW,
) -> Cost:
    """A whole generation of one batch: the prompt, then token by token until `new_tokens`.

    `recompute` takes the logits of all its positions in each step, as published.
    Raises ValueError for an unknown loop or sizes below one.
    """
    if loop not in LOOPS:
        raise ValueError(f"unknown loop {loop!r}: choose {', '.join(LOOPS)}")
    if min(batch, prompt_tokens, new_tokens) < 1:
        raise ValueError(
            f"batch {batch}, prompt {prompt_tokens} and new tokens {new_tokens}: each at least 1"
        )
    if loop == "recompute":
        lengths = Counter(min(window, prompt_tokens + i) for i in range(new_tokens))
        passes = (
            forward(shape, dtype, batch, n, 0, quantization, False, logits=n) * times
            for n, times in lengths.items()
        )
        return sum(passes, Cost(0, 0, 0))
    prefill = forward(shape, dtype, batch, prompt_tokens, 0, quantization)
    return prefill + _decode_steps(shape, dtype, batch, prompt_tokens, new_tokens - 1, quantization)


def _decode_steps(shape, dtype, batch, past, steps, quantization) -> Cost:
    """`steps` cached steps from `past` on: the sum of their `forward`, without a loop."""
    per_token = batch * shape.kv_elements_per_token * dtype_bytes(dtype)
    windows = Counter(shape.windows or (None,) * shape.layers)
    entries = sum(n * _pairs(steps, past - 1, w) for w, n in windows.items())
    moved = steps * weights_read(shape, dtype, quantization)
    moved += per_token * (entries + steps * shape.layers)
    row = steps * (linear_flops(shape) + 2 * shape.vocab * shape.hidden)
    return Cost(moved, batch * (row + attention_flops(shape, steps, past)), steps)
