"""What a decoding step does beside its matrix products, timed on a processor.

Of an eager loop: norms, residual sums, rotations, the gate and attention, each alone, on tensors of
the model's sizes. Of both loops: drawing the next token.
"""

from __future__ import annotations

from functools import cache
from statistics import median

from llmperf.decoding.sampling import Sampling, next_tokens
from llmperf.machine import DTYPES
from llmperf.machine.timing import seconds_of
from llmperf.models import ModelShape


@cache
def eager_s(shape: ModelShape, dtype: str, rows: int, new: int, seen: int) -> float:
    """Median seconds of all layers' operations for `rows` texts of `new` tokens, `seen` in all."""
    import torch

    kind = getattr(torch, DTYPES[dtype])
    x = torch.randn(rows, new, shape.hidden).to(kind)
    wide = torch.randn(rows, new, shape.intermediate).to(kind)
    query = torch.randn(rows, shape.heads, new, shape.head_dim).to(kind)
    layers = range(shape.layers)  # each has its own keys, which no cache may hold all of
    kv = [torch.randn(2, rows, shape.kv_heads, seen, shape.head_dim).to(kind) for _ in layers]
    attend = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        for keys, values in kv:
            _small(x, wide, query, keys[:, :, -new:], not shape.learned_positions)
            attend(query, keys, values, enable_gqa=True)

    with torch.inference_mode():
        return median(seconds_of(run, lambda: None, 7))


@cache
def drawing_s(vocabulary: int, dtype: str, rows: int, sampling: Sampling) -> float:
    """Median seconds from logits (rows, vocabulary) to tokens that the processor can read."""
    import torch

    logits = torch.randn(rows, vocabulary).to(getattr(torch, DTYPES[dtype]))
    uniform = torch.rand(rows, dtype=torch.float64)
    return median(seconds_of(lambda: next_tokens(logits, sampling, uniform), lambda: None, 9))


def _small(x, wide, query, keys, rotated: bool) -> None:
    """Two norms, two residual sums, the gate and, where positions are rotary, two rotations."""
    import torch

    norm, silu = torch.nn.functional.rms_norm, torch.nn.functional.silu
    for _ in range(2):
        norm(x, x.shape[-1:])
        x + x
    silu(wide) * wide
    for part in (query, keys) if rotated else ():
        half = part.shape[-1] // 2
        part * part + torch.cat((-part[..., half:], part[..., :half]), -1) * part
