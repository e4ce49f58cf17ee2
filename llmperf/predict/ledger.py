"""The memory ledger: every byte that a run will hold, named, with a low and a high bound.

Bytes are exact where arithmetic can know them (weights, buffers, cache, how the allocator places
them); elsewhere a line has its own low and high. Levels follow what can be read from a device:
`allocated` tensors, `reserved` by the allocator, the `process` with its context and libraries,
the `device` with what others use. Each holds the ones before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmperf.models.tensors import ModelShape
from llmperf.predict import ledger_lines as lines_of
from llmperf.predict.costs import LOOPS
from llmperf.predict.ledger_lines import Line, Plan, at_rest

__all__ = ["LEVELS", "Ledger", "Line", "at_rest", "memory"]

LEVELS = ("allocated", "reserved", "process", "device")
PLATFORMS = ("linux", "wsl2", "windows", "cpu")
STRATEGIES = (
    "sequential", "batch", "coroutine", "threads", "processes", "dynamic", "continuous",
)  # fmt: skip


@dataclass(frozen=True)
class Ledger:
    """The lines of one run, for all its processes together, and what a reader should be told."""

    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()

    @property
    def low(self) -> int:
        """Bytes on the device at least."""
        return sum(line.low for line in self.lines)

    @property
    def high(self) -> int:
        """Bytes on the device at most."""
        return sum(line.high for line in self.lines)

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def at(self, level: str) -> tuple[int, int]:
        """(low, high) bytes of a level: that of its own lines and of the levels inside it."""
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}: choose {', '.join(LEVELS)}")
        inside = LEVELS[: LEVELS.index(level) + 1]
        lines = [line for line in self.lines if line.level in inside]
        return sum(line.low for line in lines), sum(line.high for line in lines)

    def to_dict(self) -> dict:
        """As JSON-ready values, for a record."""
        levels = {
            level: dict(zip(("low", "high"), self.at(level), strict=True)) for level in LEVELS
        }
        lines = [vars(line) for line in self.lines]
        return {"lines": lines, "levels": levels, "warnings": list(self.warnings)}


def memory(
    shape: ModelShape,
    dtype: str = "fp16",
    quantization: str | None = None,
    batch: int = 1,
    prompt_tokens: int | Sequence[int] = 32,
    new_tokens: int = 128,
    strategy: str = "sequential",
    workers: int = 1,
    platform: str = "linux",
    loop: str = "cached",
    *,
    hopper: bool = False,
    masks: bool = False,
    attention: str = "sdpa",
    overhead: Mapping | None = None,
    idle_bytes: int | None = None,
) -> Ledger:
    """The ledger of a run, from the configuration alone, at its peak.

    `batch` rows per step, all padded to the longest prompt. `workers` are the threads or processes
    of those strategies, and 1 for the others. `hopper`: compute capability 9 or later. `masks`:
    the mask or cosine buffers of transformers 4 (see `buffers_bytes`). `attention` eager keeps the
    scores, sdpa does not. `overhead` is the result of `ceilings.overhead`, `idle_bytes` what is
    used before anything starts; without them a range for the platform is taken.
    Raises ValueError for words and sizes that cannot be.
    """
    longest = prompt_tokens if isinstance(prompt_tokens, int) else max(prompt_tokens, default=0)
    plan = Plan(
        shape, dtype, quantization, batch, longest, new_tokens, strategy, workers, platform, loop,
        hopper, masks, attention,
    )  # fmt: skip
    _check(plan)
    cuda = platform != "cpu"
    lines = [
        lines_of.weights(plan),
        lines_of.buffers(plan),
        lines_of.cache(plan),
        *lines_of.peak(plan),
    ]
    if cuda:
        lines += [lines_of.workspaces(plan), lines_of.rounding(plan)]
    lines += [
        lines_of.slack(plan, lines),
        lines_of.context(plan, overhead),
        lines_of.idle(plan, idle_bytes),
    ]
    return Ledger(tuple(lines), _warnings(plan, overhead, idle_bytes))


def _check(p: Plan) -> None:
    for name, value, known in (
        ("strategy", p.strategy, STRATEGIES),
        ("platform", p.platform, PLATFORMS),
        ("loop", p.loop, LOOPS),
        ("attention", p.attention, ("sdpa", "eager")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose {', '.join(known)}")
    if min(p.batch, p.prompt, p.new, p.workers) < 1:
        raise ValueError(
            f"batch {p.batch}, prompt {p.prompt}, new tokens {p.new}, workers {p.workers}: "
            "each must be at least 1"
        )


def _warnings(p: Plan, overhead: Mapping | None, idle_bytes: int | None) -> tuple[str, ...]:
    found = []
    total = p.seen + 1 if p.loop == "recompute" else p.prompt + p.new
    if total > p.shape.max_positions:
        found.append(
            f"{p.prompt} + {p.new} tokens are beyond the {p.shape.max_positions} positions of "
            f"{p.shape.name}: the memory is right, the text would not be"
        )
    if p.platform in ("windows", "wsl2") and idle_bytes is None:
        found.append("other programs share this card: shared nodes held 2.5 and 3.3 GiB at rest")
    return tuple(found)
