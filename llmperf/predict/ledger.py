"""The memory ledger: every byte that a run will hold, named, with a low and a high bound.

Each level (see LEVELS) holds the ones before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llmperf.machine import GIB
from llmperf.models import ModelShape
from llmperf.predict import sizes
from llmperf.predict.allocator import LARGE_SEGMENT, MIB, ROUND_LARGE, Placed, place
from llmperf.predict.sizes import dtype_bytes, kv_bytes
from llmperf.predict.spec import RunSpec

LEVELS = ("allocated", "reserved", "process", "device")
# cuBLAS workspace for each (handle, stream): 2 x 4 MiB + 8 x 16 KiB before Hopper, 32 MiB from
# compute capability 9 on (ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER = 8 * MIB + MIB // 8, 32 * MIB
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
    """One entry in bytes: how much at least, and how much at most."""

    name: str
    level: str
    low: int
    high: int


@dataclass(frozen=True)
class Ledger:
    """The lines of one run, for all its processes together, and what a reader should be told."""

    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()

    @property
    def low(self) -> int:
        return self.at("device")[0]

    @property
    def high(self) -> int:
        return self.at("device")[1]

    def line(self, name: str) -> Line:
        return next(line for line in self.lines if line.name == name)

    def at(self, level: str) -> tuple[int, int]:
        """(low, high) bytes of a level, with the levels inside it."""
        inside = LEVELS[: LEVELS.index(level) + 1]
        lines = [line for line in self.lines if line.level in inside]
        return sum(line.low for line in lines), sum(line.high for line in lines)


def memory(
    spec: RunSpec,
    *,
    overhead: Mapping | None = None,
    idle_bytes: int | None = None,
    beside_another: bool = False,
) -> Ledger:
    """The ledger of a run at its peak.

    `overhead` is the result of `machine.overhead`, `idle_bytes` what is used before anything
    starts; without them a range for the platform is taken. `beside_another`: another process
    already holds what all processes share.
    """
    s = spec
    weights = sizes.weights_bytes(s.shape, s.dtype, s.quantization) * s.processes
    buffers = sum(sizes.buffers(s.shape, s.dtype, s.masks)) * s.processes
    batches = 0 if s.loop == "recompute" else s.concurrent * s.processes
    # A graph's buffers are rounded up; those of `cached`, which runs where no graph can, are not.
    cached, room = (
        batches * kv_bytes(s.shape, *size, s.dtype) for size in ((s.rows, s.length), s.cache_room)
    )
    kept = [
        Line("weights", "allocated", weights, weights),
        Line("buffers", "allocated", buffers, buffers),
    ]
    moving = [Line("kv cache", "allocated", cached, room), *_peak(s)]
    if s.platform == "cpu":  # the C library keeps freed memory, at most once the cache
        allocator = [Line("allocator slack", "reserved", 0, cached)]
    else:
        allocator = _allocator(s, moving)
    low, high = (int(x * GIB) for x in IDLE_GIB[s.platform])
    if idle_bytes is not None:
        low = high = idle_bytes
    idle = Line("in use before the start", "device", low, high)
    lines = (*kept, *moving, *allocator, _context(s, overhead, beside_another), idle)
    return Ledger(lines, _warnings(s))


def _peak(s: RunSpec) -> list[Line]:
    """What the largest moment needs beyond the weights and the final cache.

    Low: each process has one worker at its peak, and frees activations before its logits exist.
    High: all workers peak at the same time, each with its activations and its logits.
    """
    positions = s.seen if s.loop == "recompute" else 1
    logits = s.rows * positions * s.shape.vocab * dtype_bytes(s.dtype)
    # Sampling works in fp32 on the last position: a copy, its sorted form, the probabilities.
    sampling = 4 * s.rows * s.shape.vocab * 4
    # A loop that holds its last output while the next pass runs has the logits twice.
    twice = logits if s.loop == "recompute" else 0
    low, high = _widest(s)
    least, most = s.processes, s.processes * s.concurrent
    activations = (max(0, int(low) - logits) * least, int(high) * most)
    return [
        Line("activations", "allocated", *activations),
        Line("logits", "allocated", logits * least, (logits + twice + sampling) * most),
    ]


def _widest(s: RunSpec) -> tuple[int, ...]:
    """Bytes beyond the final cache: in the prefill, when the cache is still small (though a
    sliding layer holds the whole prompt), or in the last step; whichever is more.
    """
    growth = copies = 0
    if s.loop == "cached":
        prompt = s.rows * s.prompt_tokens * sizes.token_bytes(s.shape, s.dtype)
        growth = kv_bytes(s.shape, s.rows, s.length, s.dtype) - prompt
    if s.loop == "cached" or (s.loop == "compiled" and s.shape.latent):
        copies = s.rows * s.length * s.shape.step_copies * dtype_bytes(s.dtype)
    prefill, step = _activations(s, s.rows * s.seen), _activations(s, s.rows)
    return tuple(max(0, a - growth, b + copies) for a, b in zip(prefill, step, strict=True))


def _activations(s: RunSpec, tokens: int) -> tuple[int, int]:
    """Bytes alive at the widest place of a layer: in its feed-forward part or in its attention.

    At least the residual, its normed copy, and `widest_layer`. At most the norm in fp32 too.
    """
    hidden, item = s.shape.hidden, dtype_bytes(s.dtype)
    wide, most = widest_layer(s.shape)
    least = tokens * (2 * hidden + wide) * item
    return least, tokens * ((2 * hidden + most) * item + 2 * hidden * 4)


def widest_layer(shape: ModelShape) -> tuple[int, int]:
    """Elements of a token that are alive inside the widest block: at least the outputs of its first
    linear layers and the input of its last; at most also rotated copies, or a GELU in Python."""
    feed, attention = shape.widths("feed-forward", "expert"), shape.widths("attention")
    wide = max((first + last for first, last in feed | attention), default=0)
    most = max(
        *(2 * first + last for first, last in attention | {(0, 0)}),
        *(max(2 * first, (5 if first <= last else 4) * last) for first, last in feed | {(0, 0)}),
    )
    return wide, most


@lru_cache(maxsize=128)
def at_rest(
    shape: ModelShape,
    dtype: str,
    quantization: str | None = None,
    *,
    handles: int = 1,
    masks: bool = False,
) -> Placed:
    """What the allocator holds between two generations: weights, buffers and workspaces, placed."""
    found = [size for _, size in sizes.tensors(shape, dtype, quantization)]
    found += sizes.buffers(shape, dtype, masks)
    return place(found + [CUBLAS_WORKSPACE] * handles)


def _allocator(s: RunSpec, moving: list[Line]) -> list[Line]:
    """cuBLAS workspaces (one for each thread's handle; where handles and streams meet in other
    pairs from run to run, at most one a pair), what rounding adds, and slack: ends of segments, and
    holes that a growing cache leaves, no larger than itself."""
    handles = 1 + s.threads  # the main thread's too
    placed = at_rest(s.shape, s.dtype, s.quantization, handles=handles, masks=s.masks)
    spare = (placed.reserved - placed.allocated) * s.processes
    # What moves can lie in the spare ends of segments; every concurrent batch opens new ones.
    least = max(0, spare - sum(line.low for line in moving))
    opened = (LARGE_SEGMENT + ROUND_LARGE) * 2 * s.concurrent * s.processes
    rounding = (placed.allocated - placed.requested) * s.processes
    most = spare + sum(line.high for line in moving) + opened
    pairs = 1 + s.threads * s.streams
    workspaces = (handles * CUBLAS_WORKSPACE, pairs * CUBLAS_WORKSPACE_HOPPER)
    return [
        Line("workspaces", "allocated", *(s.processes * x for x in workspaces)),
        Line("rounding", "allocated", rounding, rounding),
        Line("allocator slack", "reserved", least, most),
    ]


def _context(s: RunSpec, measured: Mapping | None, beside_another: bool) -> Line:
    ends = [tuple(x * GIB for x in pair) for pair in OVERHEAD_GIB[s.platform]]  # (low, high) each
    if measured and measured.get("first"):
        found = (measured["first"], measured["further"])
        ends = [(e["forward"]["rss"] if s.platform == "cpu" else e["total"],) * 2 for e in found]
    first, each = (ends[1], ends[1]) if beside_another else ends
    low, high = (first[i] + each[i] * (s.processes - 1) for i in range(2))
    return Line("context and libraries", "process", int(low), int(high))


def least_context(platform: str) -> int:
    """Bytes that the context and libraries of a process take at least, where it is the first."""
    return int(OVERHEAD_GIB[platform][0][0] * GIB)


def _warnings(s: RunSpec) -> tuple[str, ...]:
    read = s.seen + 1 if s.loop == "recompute" else s.prompt_tokens + s.new_tokens
    if read <= s.shape.max_positions:
        return ()
    return (
        f"{s.prompt_tokens} + {s.new_tokens} tokens are beyond the {s.shape.max_positions}"
        f" positions of {s.shape.name}: the memory is right, the text would not be",
    )
