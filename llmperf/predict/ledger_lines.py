"""The lines of the memory ledger, one function each; see `ledger`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llmperf.models.tensors import ModelShape
from llmperf.predict import sizes
from llmperf.predict.allocator import (
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACE_HOPPER,
    LARGE_SEGMENT,
    ROUND_LARGE,
    Placed,
    place,
)
from llmperf.predict.costs import WINDOW
from llmperf.predict.sizes import buffers_bytes, dtype_bytes, kv_bytes, stored, weights_bytes

GIB = 2**30

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


@dataclass(frozen=True)
class Plan:
    """The run that a ledger is about, checked; sizes are per worker."""

    shape: ModelShape
    dtype: str
    quantization: str | None
    batch: int
    prompt: int
    new: int
    strategy: str
    workers: int
    platform: str
    loop: str
    hopper: bool
    masks: bool
    attention: str

    @property
    def processes(self) -> int:
        return self.workers if self.strategy == "processes" else 1

    @property
    def threads(self) -> int:
        """Requests or batches that run at the same time in one process."""
        return self.workers if self.strategy == "threads" else 1

    @property
    def length(self) -> int:
        """Tokens of a row that the cache holds at the end; a static one has room for all."""
        return self.prompt + self.new - (self.loop != "compiled")

    @property
    def seen(self) -> int:
        """Tokens of a row in the largest forward pass."""
        return min(WINDOW, self.prompt + self.new - 1) if self.loop == "recompute" else self.prompt

    @property
    def workspace(self) -> int:
        return CUBLAS_WORKSPACE_HOPPER if self.hopper else CUBLAS_WORKSPACE

    @property
    def handles(self) -> int:
        """cuBLAS handles of one process: the main thread's and one for each worker thread."""
        return 1 + (self.workers if self.strategy == "threads" else 0)


def _exact(name: str, size: int, why: str, level: str = "allocated") -> Line:
    return Line(name, level, int(size), int(size), why)


def _times(n: int, what: str) -> str:
    return f", for each of {n} {what}" if n > 1 else ""


def weights(p: Plan) -> Line:
    """The parameters as stored, in every process."""
    size = weights_bytes(p.shape, p.dtype, p.quantization)
    how = p.quantization or p.shape.quantization or p.dtype
    why = f"{p.shape.parameters():,} parameters as {how}: {size:,} bytes"
    return _exact("weights", size * p.processes, why + _times(p.processes, "processes"))


def buffers(p: Plan) -> Line:
    """What modules keep beside their parameters."""
    size = buffers_bytes(p.shape, p.dtype, p.masks)
    why = f"masks, rotary tables and scales: {size:,} bytes" + _times(p.processes, "processes")
    return _exact("buffers", size * p.processes, why)


def cache(p: Plan) -> Line:
    """Keys and values of all rows when the last token has come."""
    if p.loop == "recompute":
        return _exact("kv cache", 0, "the loop recomputes the text and keeps no cache")
    size = kv_bytes(p.shape, p.batch, p.length, p.dtype)
    per_token = p.shape.layers * p.shape.kv_elements_per_token * dtype_bytes(p.dtype)
    kind = "latent and rotary key" if p.shape.mla else f"{p.shape.kv_heads} key-value heads"
    window = ", less where a layer slides" if p.shape.windows else ""
    why = f"{p.batch} rows x {p.length} tokens x {per_token:,} bytes ({kind}{window})"
    why += _times(p.workers, p.strategy)
    return _exact("kv cache", size * p.threads * p.processes, why)


def peak(p: Plan) -> list[Line]:
    """What the largest moment needs beyond the weights and the final cache.

    At least: one worker at a time is at its widest, and a layer's intermediates are gone when the
    logits come. At most: all threads are there at once, and both count.
    """
    positions = p.seen if p.loop == "recompute" else 1
    logits = p.batch * positions * p.shape.vocab * dtype_bytes(p.dtype)
    # Sampling works in fp32 on the last position: a copy, its sorted form, the probabilities.
    sampling = 4 * p.batch * p.shape.vocab * 4
    # A loop that holds its last output while the next pass runs has the logits twice.
    kept = logits if p.loop == "recompute" else 0
    low, high = _widest(p)
    least, most = p.processes, p.processes * p.threads
    layers = f"a forward pass over {p.batch} x {p.seen} tokens at the widest place of a layer"
    layers += ", one to all threads at it" if p.threads > 1 else ""
    last = f"{p.batch} x {positions} positions x {p.shape.vocab:,} entries, and sampling's copies"
    act = (max(0, int(low) - logits) * least, int(high) * most)
    return [
        Line("activations", "allocated", *act, layers),
        Line("logits", "allocated", logits * least, (logits + kept + sampling) * most, last),
    ]


def _widest(p: Plan) -> tuple[int, int]:
    """Bytes beyond the final cache: in the prefill, when the cache is still small, or in the last
    step, which holds one layer's keys twice while it appends; whichever is more."""
    growth = 0
    if p.loop == "cached":
        growth = kv_bytes(p.shape, p.batch, p.length, p.dtype) - _prefill_cache(p)
    prefill, step = _activations(p, p.batch * p.seen), _activations(p, p.batch)
    extra = _step_copies(p)
    return tuple(max(0, a - growth, b + extra) for a, b in zip(prefill, step, strict=True))


def _prefill_cache(p: Plan) -> int:
    """Bytes of the cache right after the prefill: a sliding layer still holds the whole prompt."""
    per_token = p.shape.layers * p.shape.kv_elements_per_token * dtype_bytes(p.dtype)
    return p.batch * p.prompt * per_token


def _step_copies(p: Plan) -> int:
    """What a decode step copies of one layer's cache: DynamicCache appends by concatenating keys,
    then values, so one stands twice; latent attention expands keys and values of all tokens."""
    m, size = p.shape.mla, p.batch * p.length * dtype_bytes(p.dtype)
    if p.loop == "recompute":
        return 0
    if m:
        return size * p.shape.heads * (2 * m.nope_dim + m.rope_dim + m.value_dim)
    return size * p.shape.kv_heads * p.shape.head_dim if p.loop == "cached" else 0


def _activations(p: Plan, tokens: int) -> tuple[int, int]:
    """Bytes alive at the widest place of a layer: in its MLP or in its attention.

    MLP: the residual, its normed copy and three intermediates (activation, up, product), or two
    without a gate. Attention: residual, normed copy, queries, keys, values and the output. At
    most: the norm in fp32, rotated copies, the four intermediates of a GELU written in Python.
    """
    s, item = p.shape, dtype_bytes(p.dtype)
    if s.mla:  # queries, the expanded keys and values
        wide = s.heads * (2 * (s.mla.nope_dim + s.mla.rope_dim) + s.mla.value_dim)
        out = s.heads * s.mla.value_dim
    else:
        wide, out = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
    width = s.intermediate if s.moe is None else max(
        s.intermediate, s.moe.intermediate * s.moe.per_token
    )  # fmt: skip
    mlp = (3 if s.gated_mlp else 2) * width
    low = tokens * (2 * s.hidden + max(mlp, wide + out)) * item
    most = max((4 if s.gated_mlp else 5) * width, 2 * wide + out)
    high = tokens * ((2 * s.hidden + most) * item + 2 * s.hidden * 4)
    if p.attention == "eager":
        scores = tokens * s.heads * p.seen
        low, high = low + scores * item, high + scores * (4 + 2 * item)
    return low, high


def workspaces(p: Plan) -> Line:
    """cuBLAS workspaces; a thread has a handle, and so a workspace, of its own."""
    why = f"cuBLAS takes {p.workspace / 2**20:.3f} MiB for each handle and stream; "
    why += f"{p.handles} in a process" if p.handles > 1 else "one in a process"
    return _exact("workspaces", p.workspace * p.handles * p.processes, why)


@lru_cache(maxsize=128)
def _placed(shape, dtype, quantization, masks, workspace, handles) -> Placed:
    found = [size for _, size in stored(shape, dtype, quantization)]
    found += sizes.buffers(shape, dtype, masks)
    return place(found + [workspace] * handles)


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
    return _placed(shape, dtype, quantization, masks, workspace, handles)


def _resting(p: Plan) -> Placed:
    return _placed(p.shape, p.dtype, p.quantization, p.masks, p.workspace, p.handles)


def rounding(p: Plan) -> Line:
    """What the allocator counts as allocated beyond what was asked for."""
    placed = _resting(p)
    why = "blocks are multiples of 512 bytes, and a rest below 1 MiB stays with its tensor"
    return _exact("rounding", (placed.allocated - placed.requested) * p.processes, why)


def slack(p: Plan, lines: list[Line]) -> Line:
    """Reserved but not allocated: ends of segments, and holes that a growing cache leaves."""
    if p.platform == "cpu":
        freed = next(line.low for line in lines if line.name == "kv cache")
        why = "freed memory that the C library keeps, at most once the cache"
        return Line("allocator slack", "reserved", 0, freed, why)
    placed = _resting(p)
    low = (placed.reserved - placed.allocated) * p.processes
    moving = [line for line in lines if line.name in ("kv cache", "activations", "logits")]
    moved = sum(line.high for line in moving)
    # Every concurrent stream of work opens segments of its own; a cache that grows by copying
    # leaves holes no larger than itself.
    opened = (LARGE_SEGMENT + ROUND_LARGE) * 2 * p.threads * p.processes
    why = f"{placed.reserved / GIB:.2f} GiB of segments for what stays, and holes of what moves"
    # What moves can lie in the rest of those segments, so the low bound gives that back.
    least = max(0, low - sum(line.low for line in moving))
    return Line("allocator slack", "reserved", least, low + moved + opened, why)


def context(p: Plan, measured: Mapping | None) -> Line:
    """Context and libraries of the first process, and of each further one."""
    first, further = OVERHEAD_GIB[p.platform]
    low, high = ((first[i] + further[i] * (p.processes - 1)) * GIB for i in range(2))
    source = f"range for {p.platform}"
    if measured and measured.get("first"):
        ends = [_total(measured[k], p.platform) for k in ("first", "further")]
        low = high = ends[0]["median"] + ends[1]["median"] * (p.processes - 1)
        spread = 3 * (ends[0]["mad"] + ends[1]["mad"] * (p.processes - 1))
        low, high, source = low - spread, high + spread, "measured here"
    why = f"context and libraries, {source}: first process" + (
        f" and {p.processes - 1} further" if p.processes > 1 else ""
    )
    return Line("context and libraries", "process", int(low), int(high), why)


def _total(measured: Mapping, platform: str) -> Mapping:
    return measured["forward"]["rss"] if platform == "cpu" else measured["total"]


def idle(p: Plan, idle_bytes: int | None) -> Line:
    """What others use on the device."""
    if idle_bytes is not None:
        return _exact("idle use", idle_bytes, "in use before the run, as given", "device")
    low, high = (int(x * GIB) for x in IDLE_GIB[p.platform])
    why = "display and other programs at rest; measure it before the run"
    return Line("idle use", "device", low, high, why)
