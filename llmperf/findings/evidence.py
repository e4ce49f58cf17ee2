"""From records to samples: which runs count, which belong together, and what a ratio of them says.

A setting is what two runs must share before their times say anything about a strategy: machine,
model, dtype, lengths, sampling. Runs that failed or cannot be true are left out, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmperf import stats, strategies

HOLDS, FAILS = "holds", "does not hold"
CANNOT_TELL, NOT_TESTABLE = "cannot tell", "not testable here"
LEAST_RANGE = 3  # repeats on each side from which full separation has a chance of at most 1 in 20
INTERACTION = ("strategy", "level", "options", "loop", "seed", "stop")


@dataclass(frozen=True)
class Figure:
    """One number with what is known of its spread. `basis` says what low and high are."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    basis: str = ""

    @property
    def span(self) -> str:
        """The value with its low and high, where there are any."""
        if self.low is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def ratio(a: Sequence[float], b: Sequence[float], scale: float = 1.0) -> Figure | None:
    """median(a) / median(b) × scale: the 95 % interval from 5 repeats on, the range of all pairs
    from 3, and the bare value below. None when a side is empty or holds a 0."""
    if not len(a) or not len(b) or min(*a, *b) <= 0:
        return None
    found = stats.ratio_interval(a, b)
    value = found.value * scale
    if found.low is not None:
        return Figure(value, found.low * scale, found.high * scale, found.n, "95 % interval")
    if found.n >= LEAST_RANGE:
        low, high = min(a) / max(b) * scale, max(a) / min(b) * scale
        return Figure(value, low, high, found.n, f"range of {found.n} repeats, no interval")
    return Figure(value, None, None, found.n, f"{found.n} repeat{'s' * (found.n > 1)}, no interval")


def judge(
    figure: Figure, least: float = float("-inf"), most: float = float("inf")
) -> tuple[str, str]:
    """`(verdict, what the value alone points to)` for a claim that the figure lies in a region."""
    points_to = HOLDS if least <= figure.value <= most else FAILS
    if figure.low is None:
        return CANNOT_TELL, points_to
    if least <= figure.low and figure.high <= most:
        return HOLDS, points_to
    if figure.high < least or figure.low > most:
        return FAILS, points_to
    return CANNOT_TELL, points_to


@dataclass(frozen=True)
class Setting:
    """Runs that may be compared with each other: `key` is what they share, `name` says it."""

    key: str
    name: str
    os: str
    hardware: str  # the card, or the processor where there is no card
    has_gpu: bool
    condition: Mapping  # of the first run; only what all share counts
    environment: Mapping
    rows: list[Mapping] = field(repr=False)

    @property
    def loop(self) -> str:
        """The decoding loop that all its runs used."""
        return self.condition.get("loop", "cached")

    def runs(self, strategy: str, level: int | None = None, **options) -> list[Mapping]:
        """The runs of a strategy (at a level) with one worker a request; with these options."""
        return [
            r
            for r in self.rows
            if r["condition"]["strategy"] == strategy
            and level in (None, r["condition"]["level"])
            and _one_worker_each(r["condition"])
            and options.items() <= (r["condition"].get("options") or {}).items()
        ]

    def levels(self, strategy: str, timed: bool = True) -> set[int]:
        """The levels at which the strategy ran, and was timed (a table of memory has no times)."""
        return {
            r["condition"]["level"]
            for r in self.runs(strategy)
            if not timed or r["metrics"].get("duration_s") is not None
        }

    def alike(self, strategy: str, level: int, **options) -> list[Mapping]:
        """The runs of one variant: the one nearest to the strategy's defaults."""
        by: dict[tuple, list] = {}
        for row in self.runs(strategy, level, **options):
            given = row["condition"].get("options") or {}
            others = {k: v for k, v in given.items() if k not in options}
            by.setdefault(_distance(others), []).append(row)
        return by[min(by)] if by else []

    def metric(self, name: str, strategy: str, level: int, **options) -> list[float]:
        """One value a run, of a plain metric such as `duration_s`."""
        values = (r["metrics"].get(name) for r in self.alike(strategy, level, **options))
        return [x for x in values if x is not None]

    def seconds(self, strategy: str, level: int, **options) -> list[float]:
        """Duration of each run."""
        return self.metric("duration_s", strategy, level, **options)

    def in_a_row(self, n: int) -> tuple[list[float], str]:
        """Seconds of n requests one after another: measured so, or n times one; and which."""
        if measured := self.seconds("sequential", n):
            return measured, f"{n} requests in a row"
        for strategy in ("sequential", "threads", "coroutine", "batch"):
            if one := self.seconds(strategy, 1):
                return [s * n for s in one], f"{n} times one request"
        return [], ""

    def peaks(self, channel: str, strategy: str, level: int, of: str = "max") -> list[float]:
        """A memory channel's highest (or `of`) value in each run that could read it."""
        found = (r["memory"].get(channel) or {} for r in self.alike(strategy, level))
        return [c[of] for c in found if c.get("status", "ok") == "ok" and c.get(of) is not None]


def _one_worker_each(condition: Mapping) -> bool:
    """Ten requests at once through two threads say nothing of ten threads. Under an arriving load
    the level counts requests, not workers."""
    if condition.get("arrivals"):
        return True
    options = condition.get("options") or {}
    return options.get("workers", condition["level"]) == condition["level"]


def _distance(options: Mapping) -> tuple:
    """How far options are from the defaults: torch gives an operator all cores, for instance."""
    default = {"stream": "default", "variant": "blocking", "weights": "own", "max_batch": 8}
    changed = sum(v != default.get(k) for k, v in options.items() if k != "intra_op")
    return changed, -options.get("intra_op", 0), json.dumps(options, sort_keys=True)


@dataclass(frozen=True)
class Evidence:
    """All that the checks look at."""

    settings: tuple[Setting, ...]  # requests all at once
    arriving: tuple[Setting, ...]  # requests that arrive over time: their durations say little
    failed: tuple[Mapping, ...]  # runs with status oom, error or skipped
    impossible: Mapping[str, int]  # setting key → runs left out, being faster than they can be

    def with_all(self, *wanted: tuple[str, int | None]) -> list[Setting]:
        """The settings that hold all of these strategies at these levels (None: any)."""
        return [s for s in self.settings if all(s.runs(name, level) for name, level in wanted)]


def gather(records: Iterable, across: bool = False, impossible_too: bool = False) -> Evidence:
    """Sort records (Record or dict) into settings.

    Runs of one experiment were interleaved, so they come together; `across` experiments is for
    what no single one of them holds. Runs faster than their machine can be are left out, and
    counted, unless `impossible_too`.
    """
    rows = [r if isinstance(r, Mapping) else vars(r) for r in records]
    rows = [r for r in rows if r.get("kind", "measure") == "measure" and r.get("condition")]
    # Another engine is what strategies stand beside, never one of them to judge or recommend.
    foreign = {name for name, s in strategies.STRATEGIES.items() if s.foreign}
    rows = [r for r in rows if r["condition"].get("strategy") not in foreign]
    ok = [r for r in rows if r.get("status", "ok") == "ok" and r.get("metrics")]
    groups: dict[str, list] = {}
    impossible: Counter = Counter()
    for row in ok:
        key = setting_key(row, across)
        if (row.get("prediction") or {}).get("plausible") is False:
            impossible[key] += 1
            if not impossible_too:
                continue
        groups.setdefault(key, []).append(row)
    settings = tuple(_setting(key, rows) for key, rows in groups.items())
    at_once = tuple(s for s in settings if not s.condition.get("arrivals"))
    arriving = tuple(s for s in settings if s.condition.get("arrivals"))
    failed = tuple(r for r in rows if r.get("status", "ok") != "ok")
    return Evidence(at_once, arriving, failed, impossible)


def setting_key(row: Mapping, across: bool = False) -> str:
    """What a run shares with those that it may be compared with, as text."""
    condition = {k: v for k, v in row["condition"].items() if k not in INTERACTION}
    loop = row["condition"].get("loop", "cached")
    where = (os_of(row), hardware_of(row), "" if across else row.get("experiment"))
    return json.dumps([*where, loop, condition], sort_keys=True, default=str)


def os_of(row: Mapping) -> str:
    """Windows, WSL2, Linux, macOS; `unknown` for a run without an environment."""
    return (row.get("environment") or {}).get("os") or "unknown"


def hardware_of(row: Mapping) -> str:
    """The card if the run used one, else the processor: what a pair of runs must share."""
    env = row.get("environment") or {}
    if row["condition"].get("device") != "cpu" and env.get("gpus"):
        return env["gpus"][0].get("name") or "unknown GPU"
    return env.get("cpu_model") or "unknown CPU"


def label(condition: Mapping) -> str:
    """Model, dtype, loop where it is not the usual one, and lengths: `gpt2 fp32, 32+64 tokens`."""
    c = condition
    loop = f", {c['loop']}" if c.get("loop", "cached") != "cached" else ""
    random = " random" if c.get("weights") == "random" else ""
    prompt = f"{c['prompt_tokens']}+" if c.get("prompt_tokens") else ""
    what = f"{c.get('model')} {c.get('quantization') or c.get('dtype')}{random}{loop}"
    rate = (c.get("arrivals") or {}).get("rate_per_s")
    load = f", {rate:g} arriving/s" if isinstance(rate, int | float) else ""
    return f"{what}, {prompt}{c.get('new_tokens')} tokens{load}"


def _setting(key: str, rows: list[Mapping]) -> Setting:
    first = rows[0]
    c, env = first["condition"], first.get("environment") or {}
    os, hardware = os_of(first), hardware_of(first)
    has_gpu = c.get("device") != "cpu" and bool(env.get("gpus"))
    name = f"{label(c)}, {hardware}, {os}"
    return Setting(key, name, os, hardware, has_gpu, c, env, rows)


def unstable(settings: Iterable[Setting]) -> str | None:
    """How many of these runs warned that the machine was not quiet, in one sentence."""
    rows = [r for s in settings for r in s.rows]
    dirty = [w for r in rows for w in (r.get("warnings") or [])[:1]]
    if not dirty:
        return None
    return f"{len(dirty)} of {len(rows)} runs were not quiet ({dirty[0]})"
