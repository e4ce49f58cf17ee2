"""The memory ledger: every byte that a run will hold, named, with a low and a high bound.

Bytes are exact where arithmetic can know them (weights, buffers, cache, how the allocator places
them); elsewhere a line has its own low and high. Levels follow what can be read from a device:
`allocated` tensors, `reserved` by the allocator, the `process` with its context and libraries,
the `device` with what others use. Each holds the ones before it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmperf.predict import ledger_lines as lines_of
from llmperf.predict.ledger_lines import Line
from llmperf.predict.spec import RunSpec

LEVELS = ("allocated", "reserved", "process", "device")


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
    spec: RunSpec, *, overhead: Mapping | None = None, idle_bytes: int | None = None
) -> Ledger:
    """The ledger of a run at its peak.

    `overhead` is the result of `ceilings.overhead`, `idle_bytes` what is used before anything
    starts; without them a range for the platform is taken.
    """
    lines = [
        lines_of.weights(spec),
        lines_of.buffers(spec),
        lines_of.cache(spec),
        *lines_of.peak(spec),
    ]
    if spec.platform != "cpu":
        lines += [lines_of.workspaces(spec), lines_of.rounding(spec)]
    lines += [
        lines_of.slack(spec, lines),
        lines_of.context(spec, overhead),
        lines_of.idle(spec, idle_bytes),
    ]
    return Ledger(tuple(lines), tuple(_warnings(spec, idle_bytes)))


def _warnings(s: RunSpec, idle_bytes: int | None) -> Iterator[str]:
    recompute = s.loop == "recompute"
    if (s.seen + 1 if recompute else s.prompt_tokens + s.new_tokens) > s.shape.max_positions:
        yield (
            f"{s.prompt_tokens} + {s.new_tokens} tokens are beyond the {s.shape.max_positions}"
            f" positions of {s.shape.name}: the memory is right, the text would not be"
        )
    if s.platform in ("windows", "wsl2") and idle_bytes is None:
        yield "other programs share this card: shared nodes held 2.5 and 3.3 GiB at rest"
