"""The lines of the memory ledger, one function each; see `ledger`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llmperf.machine import GIB
from llmperf.models import ModelShape
from llmperf.predict import sizes
from llmperf.predict.allocator import (
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACE_HOPPER,
    LARGE_SEGMENT,
    ROUND_LARGE,
    Placed,
    place,
)
from llmperf.predict.sizes import dtype_bytes, kv_bytes
from llmperf.predict.spec import RunSpec

# Context and libraries in GiB, (low, high) for the first process and for each further one. Windows
# and WSL2: process_vram.csv less the 0.58 GiB inside, its figures being rounded to 0.1. Linux: "a
# few hundred MB", not published; measure it. CPU: an interpreter with torch and transformers; of
# a further one the code is shared.
OVERHEAD_GIB = {
    "windows": ((0.82, 1.02), (0.0, 0.22)),
    "wsl2": ((0.02, 0.22), (0.02, 0.22)),
    "linux": ((0.2, 0.6), (0.2, 0.6)),
    "cpu": ((0.3, 0.7), (0.15, 0.5)),
}
# At rest, GiB: 0.3 (process_vram.csv) to 548 MiB (idle_vram.csv, a laptop) where a desktop runs.
IDLE_GIB = {"windows": (0.3, 0.535), "wsl2": (0.3, 0.535), "linux": (0.0, 0.05), "cpu": (0.0, 0.0)}


@dataclass(frozen=True)
class Line:
    """One entry in bytes: how much at least, how much at most, and why."""

    name: str
    level: str
    low: int
    high: int
    explanation: str


def exact(name: str, size: int, why: str, level: str = "allocated") -> Line:
    return Line(name, level, int(size), int(size), why)


def _times(**counts: int) -> str:
    """`, for each of 4 threads`, or nothing for one of each."""
    return "".join(f", for each of {n} {what}" for what, n in counts.items() if n > 1)


def weights(s: RunSpec) -> Line:
    """The parameters as stored, in every process."""
    size = sizes.weights_bytes(s.shape, s.dtype, s.quantization)
    how = s.quantization or s.shape.quantization or s.dtype
    why = f"{s.shape.parameters():,} parameters as {how}: {size:,} bytes"
    return exact("weights", size * s.processes, why + _times(processes=s.processes))


def buffers(s: RunSpec) -> Line:
    size = sizes.buffers_bytes(s.shape, s.dtype, s.masks)
    why = f"masks, rotary tables and scales: {size:,} bytes" + _times(processes=s.processes)
    return exact("buffers", size * s.processes, why)


def cache(s: RunSpec) -> Line:
    """Keys and values of all rows when the last token has come."""
    if s.loop == "recompute":
        return exact("kv cache", 0, "the loop recomputes the text and keeps no cache")
    size = kv_bytes(s.shape, s.rows, s.length, s.dtype)
    kind = "latents" if s.shape.latent else f"{s.shape.kv_heads} key-value heads"
    window = ", less where a layer slides" if any(s.shape.windows) else ""
    per_token = sizes.token_bytes(s.shape, s.dtype)
    why = f"{s.rows} rows x {s.length} tokens x {per_token:,} bytes ({kind}{window})"
    why += _times(threads=s.threads, processes=s.processes)
    return exact("kv cache", size * s.concurrent * s.processes, why)


def peak(s: RunSpec) -> list[Line]:
    """What the largest moment needs beyond the weights and the final cache.

    At least: one worker at a time is at its widest, and a layer's intermediates are gone when the
    logits come. At most: all threads are there at once, and both count.
    """
    positions = s.seen if s.loop == "recompute" else 1
    logits = s.rows * positions * s.shape.vocab * dtype_bytes(s.dtype)
    # Sampling works in fp32 on the last position: a copy, its sorted form, the probabilities.
    sampling = 4 * s.rows * s.shape.vocab * 4
    # A loop that holds its last output while the next pass runs has the logits twice.
    kept = logits if s.loop == "recompute" else 0
    low, high = _widest(s)
    least, most = s.processes, s.processes * s.concurrent
    layers = f"a forward pass over {s.rows} x {s.seen} tokens at the widest place of a layer"
    layers += ", one to all threads at it" if s.concurrent > 1 else ""
    last = f"{s.rows} x {positions} positions x {s.shape.vocab:,} entries, and sampling's copies"
    activations = (max(0, int(low) - logits) * least, int(high) * most)
    return [
        Line("activations", "allocated", *activations, layers),
        Line("logits", "allocated", logits * least, (logits + kept + sampling) * most, last),
    ]


def _widest(s: RunSpec) -> tuple[int, ...]:
    """Bytes beyond the final cache: in the prefill, when the cache is still small (though a
    sliding layer still holds the whole prompt), or in the last step, which copies a part of one
    layer's cache; whichever is more."""
    growth = 0
    if s.loop == "cached":
        prompt = s.rows * s.prompt_tokens * sizes.token_bytes(s.shape, s.dtype)
        growth = kv_bytes(s.shape, s.rows, s.length, s.dtype) - prompt
    prefill, step = _activations(s, s.rows * s.seen), _activations(s, s.rows)
    extra = _step_copies(s)
    return tuple(max(0, a - growth, b + extra) for a, b in zip(prefill, step, strict=True))


def _step_copies(s: RunSpec) -> int:
    """What a decode step copies of one layer's cache: DynamicCache appends by concatenating keys,
    then values, so one is there twice; latent attention expands keys and values of all tokens."""
    if s.loop == "recompute":
        return 0
    size = s.rows * s.length * dtype_bytes(s.dtype)
    if s.shape.latent:
        return size * max(inputs for inputs, _ in s.shape.widths("attention"))
    return size * s.shape.kv_heads * s.shape.head_dim if s.loop == "cached" else 0


def _activations(s: RunSpec, tokens: int) -> tuple[int, int]:
    """Bytes alive at the widest place of a layer: in its feed-forward part or in its attention.

    At least the residual, its normed copy, the outputs of the block's first linear layers and the
    input of its last: activation, up and product, or queries, keys, values and the attended. At
    most: the norm in fp32, rotated copies, the four intermediates of a GELU written in Python.
    """
    shape, item = s.shape, dtype_bytes(s.dtype)
    feed, attention = shape.widths("feed-forward", "expert"), shape.widths("attention")
    wide = max((first + last for first, last in feed | attention), default=0)
    most = max(
        *(2 * first + last for first, last in attention | {(0, 0)}),
        *(max(2 * first, (5 if first <= last else 4) * last) for first, last in feed | {(0, 0)}),
    )
    low = tokens * (2 * shape.hidden + wide) * item
    high = tokens * ((2 * shape.hidden + most) * item + 2 * shape.hidden * 4)
    if s.attention == "eager":
        scores = tokens * shape.heads * s.seen
        low, high = low + scores * item, high + scores * (4 + 2 * item)
    return low, high


def _handles(s: RunSpec) -> int:
    """cuBLAS handles of one process: the main thread's and one for each worker thread."""
    return 1 + s.threads


def _workspace(s: RunSpec) -> int:
    return CUBLAS_WORKSPACE_HOPPER if s.hopper else CUBLAS_WORKSPACE


def workspaces(s: RunSpec) -> Line:
    """cuBLAS workspaces: each thread has a handle, and so a workspace."""
    why = f"cuBLAS takes {_workspace(s) / 2**20:.3f} MiB for each handle and stream; "
    why += f"{_handles(s)} in a process" if _handles(s) > 1 else "one in a process"
    return exact("workspaces", _workspace(s) * _handles(s) * s.processes, why)


@lru_cache(maxsize=128)
def at_rest(
    shape: ModelShape,
    dtype: str,
    quantization: str | None = None,
    *,
    handles: int = 1,
    masks: bool = False,
    workspace: int = CUBLAS_WORKSPACE,
) -> Placed:
    """What the allocator holds between two generations: weights, buffers and workspaces, placed."""
    found = [size for _, size in sizes.tensors(shape, dtype, quantization)]
    found += sizes.buffers(shape, dtype, masks)
    return place(found + [workspace] * handles)


def _resting(s: RunSpec) -> Placed:
    how = {"handles": _handles(s), "masks": s.masks, "workspace": _workspace(s)}
    return at_rest(s.shape, s.dtype, s.quantization, **how)


def rounding(s: RunSpec) -> Line:
    """What the allocator counts as allocated beyond what was asked for."""
    placed = _resting(s)
    why = "blocks are multiples of 512 bytes, and a rest below 1 MiB stays with its tensor"
    return exact("rounding", (placed.allocated - placed.requested) * s.processes, why)


def slack(s: RunSpec, lines: list[Line]) -> Line:
    """Reserved but not allocated: ends of segments, and holes that a growing cache leaves."""
    if s.platform == "cpu":
        freed = next(line.low for line in lines if line.name == "kv cache")
        why = "freed memory that the C library keeps, at most once the cache"
        return Line("allocator slack", "reserved", 0, freed, why)
    placed = _resting(s)
    low = (placed.reserved - placed.allocated) * s.processes
    moving = [line for line in lines if line.name in ("kv cache", "activations", "logits")]
    moved = sum(line.high for line in moving)
    # Every concurrent stream of work opens segments; a cache that grows by copying leaves holes
    # no larger than itself.
    opened = (LARGE_SEGMENT + ROUND_LARGE) * 2 * s.concurrent * s.processes
    why = f"{placed.reserved / GIB:.2f} GiB of segments for what stays, and holes of what moves"
    # What moves can lie in the rest of those segments, so the low bound gives that back.
    least = max(0, low - sum(line.low for line in moving))
    return Line("allocator slack", "reserved", least, low + moved + opened, why)


def context(s: RunSpec, measured: Mapping | None) -> Line:
    """Context and libraries of the first process, and of each further one."""
    first, further = OVERHEAD_GIB[s.platform]
    low, high = ((first[i] + further[i] * (s.processes - 1)) * GIB for i in range(2))
    source = f"range for {s.platform}"
    if measured and measured.get("first"):
        ends = [measured[which] for which in ("first", "further")]
        ends = [e["forward"]["rss"] if s.platform == "cpu" else e["total"] for e in ends]
        low = high = ends[0]["median"] + ends[1]["median"] * (s.processes - 1)
        spread = 3 * (ends[0]["mad"] + ends[1]["mad"] * (s.processes - 1))
        low, high, source = low - spread, high + spread, "measured here"
    why = f"context and libraries, {source}: first process" + (
        f" and {s.processes - 1} further" if s.processes > 1 else ""
    )
    return Line("context and libraries", "process", int(low), int(high), why)


def idle(s: RunSpec, idle_bytes: int | None) -> Line:
    """What others use on the device."""
    if idle_bytes is not None:
        return exact("idle use", idle_bytes, "in use before the run, as given", "device")
    low, high = (int(x * GIB) for x in IDLE_GIB[s.platform])
    why = "display and other programs at rest; measure it before the run"
    return Line("idle use", "device", low, high, why)
