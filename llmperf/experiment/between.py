"""What a decoder layer does beside its matrix products, timed alone on a processor.

Norms, residual sums, rotations, the gate and attention, on tensors of the model's sizes. Inductor
fuses some of them in the compiled loop, whose calls cost about as much in return.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median

from llmperf.tensors import ModelShape
from llmperf.timed import DTYPES, seconds_of


def kernel(device: str, rows: int, fused: bool) -> Callable:
    """The product that the loop uses: torch's own, or on a CPU the compiled loop's kernel."""
    import torch

    from llmperf import fused as twin

    if fused and device == "cpu" and rows <= twin.KERNEL_ROWS:
        twin.build_kernels()
        return lambda weight: lambda x: torch.ops.llmperf.linear(x, [weight], [])
    return lambda weight: lambda x: torch.nn.functional.linear(x, weight)


@cache
def layer_s(shape: ModelShape, dtype: str, rows: int, new: int, seen: int, fused: bool) -> float:
    """Median seconds of one layer's operations for `rows` texts of `new` tokens, `seen` in all."""
    import torch

    kind = getattr(torch, DTYPES[dtype])
    x = torch.randn(rows, new, shape.hidden).to(kind)
    wide = torch.randn(rows, new, shape.intermediate).to(kind)
    query = torch.randn(rows, shape.heads, new, shape.head_dim).to(kind)
    layers = range(shape.layers)  # each has its own keys, which no cache may hold all of
    kv = [torch.randn(2, rows, shape.kv_heads, seen, shape.head_dim).to(kind) for _ in layers]
    attend = _attention(query, fused)

    def run() -> None:
        for keys, values in kv:
            _small(x, wide, query, keys[:, :, -new:], not shape.learned_positions)
            attend(keys, values)

    with torch.inference_mode():
        return median(seconds_of(run, lambda: None, 7)) / shape.layers


def _attention(query, fused: bool) -> Callable:
    """The kernel of the loop, as a function of keys and values."""
    import torch

    if not fused:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda keys, values: sdpa(query, keys, values, enable_gqa=True)
    from llmperf import fused as twin

    twin.build_kernels()
    rows, _, _, dim = query.shape

    def attend(keys, values):
        mask = torch.ones(rows, 1, 1, keys.shape[2], dtype=torch.bool)
        return torch.ops.llmperf.attend(query, keys, values, mask, dim**-0.5)

    return attend


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
