"""Is one set of records faster than another? A ratio with its interval, or why there is none."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmperf.stats.intervals import ratio_interval

# Fields of the condition in which two sets of records must agree before their speeds compare.
COMPARED = (
    *("model", "weights", "dtype", "quantization"),
    *("prompt_tokens", "new_tokens", "sampling", "output_tokens"),
)


class Incomparable(ValueError):
    """Two sets of records that measured different things; `differs` is `{key: (a's, b's)}`."""

    def __init__(self, differs: dict[str, tuple[str, str]]):
        self.differs = differs
        named = "; ".join(f"{key} ({a} against {b})" for key, (a, b) in differs.items())
        names = ", ".join(repr(key) for key in differs)
        super().__init__(f"these differ in {named}; to compare all the same, pass allow=({names},)")


@dataclass(frozen=True)
class Comparison:
    """a against b: `ratio` is median(a) / median(b) of the quantity, whatever its direction."""

    quantity: str
    verdict: str  # is a "faster" or "slower" than b, or "cannot tell"
    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    n: tuple[int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "no ratio" if self.ratio is None else f"{self.ratio:.3f} ×"
        if self.low is not None:
            shown += f" [{self.low:.3f}, {self.high:.3f}] at {self.confidence:.0%}"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.verdict}: {self.quantity} {shown}, n = {self.n[0]} and {self.n[1]}{notes}"


def compare(
    a_records: Iterable,
    b_records: Iterable,
    quantity: str = "output_tokens_per_s",
    allow: Sequence[str] = (),
    confidence: float = 0.95,
    paired: bool | None = None,
) -> Comparison:
    """Is a faster than b in `quantity` (a metric with its unit, or e.g. "ttft_ms.median")?

    Records are Record or its dict; only `ok` measured ones count. They are paired by round
    (`repeat`) where both sides ran in the same rounds of one run, or as `paired` says. Raises
    Incomparable, a ValueError, when a field of COMPARED differs and is not in `allow`.
    """
    a, b = _measured(a_records), _measured(b_records)
    _check_comparable(a, b, (allow,) if isinstance(allow, str) else tuple(allow))
    higher_is_better = _higher_is_better(quantity)
    x, y = _by_round(a, quantity), _by_round(b, quantity)
    whole = len(x) == len(a) and len(y) == len(b) and None not in (*x.values(), *y.values())
    if paired and not whole:
        raise ValueError(f"pairs need one record with {quantity} a round: use paired=False")
    if paired is None:
        paired = whole and x.keys() == y.keys() and all(run for run, _ in x)
    left, right = ([v for r in side if (v := _value(r, quantity)) is not None] for side in (a, b))
    if paired:
        left, right = zip(*((x[i], y[i]) for i in x if i in y), strict=True)
    found = ratio_interval(left, right, confidence, paired)
    verdict = "cannot tell"
    if found.low is not None and (found.low > 1 or found.high < 1):
        verdict = "faster" if (found.low > 1) == higher_is_better else "slower"
    notes = [*_warned("a", a), *_warned("b", b), *filter(None, [found.reason])]
    interval, n = (found.value, found.low, found.high), (len(left), len(right))
    return Comparison(quantity, verdict, *interval, confidence, n, tuple(notes))


def _measured(records: Iterable) -> list[Mapping]:
    rows = [r if isinstance(r, Mapping) else vars(r) for r in records]
    return [
        r for r in rows if (r.get("status", "ok"), r.get("kind", "measure")) == ("ok", "measure")
    ]


def _check_comparable(a: list[Mapping], b: list[Mapping], allow: tuple[str, ...]) -> None:
    if unknown := set(allow) - set(COMPARED):
        raise ValueError(f"allow names {sorted(unknown)}; it may name {', '.join(COMPARED)}")
    differs = {}
    for key in COMPARED[:-1]:
        sides = [
            {json.dumps(r.get("condition", {}).get(key), sort_keys=True, default=str) for r in side}
            for side in (a, b)
        ]
        if a and b and key not in allow and len(sides[0] | sides[1]) > 1:
            differs[key] = tuple(", ".join(sorted(side)) for side in sides)
    # Tokens that came out, per request: a run that ended early did less work.
    tokens = [np.median(t) if (t := _tokens(side)) else None for side in (a, b)]
    if None not in tokens and "output_tokens" not in allow:
        lesser, greater = sorted(tokens)
        if greater - lesser > 0.01 * greater:
            differs["output_tokens"] = tuple(f"{t:.4g} a request" for t in tokens)
    if differs:
        raise Incomparable(differs)


def _tokens(records: list[Mapping]) -> list[float]:
    rows = [r.get("metrics") or {} for r in records]
    return [m["output_tokens"] / m["requests_ok"] for m in rows if m.get("requests_ok")]


def _higher_is_better(quantity: str) -> bool:
    name = next((p for p in reversed(quantity.split(".")) if "_" in p), quantity)
    if not name.endswith(("_per_s", "_per_user", "_ms", "_s")):
        raise ValueError(f"{quantity!r} is no rate and no time: compare e.g. output_tokens_per_s")
    return name.endswith(("_per_s", "_per_user"))


def _value(record: Mapping, quantity: str) -> float | None:
    value = record.get("metrics") or {}
    for name in quantity.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        raise ValueError(f"{quantity} is a block; name a number in it: {quantity}.median")
    return value


def _by_round(records: list[Mapping], quantity: str) -> dict[tuple, float | None]:
    return {(r.get("run_id", ""), r.get("repeat")): _value(r, quantity) for r in records}


def _warned(name: str, records: list[Mapping]) -> list[str]:
    """What the records themselves warn of (instability, an implausible figure), counted."""
    texts = [str(text) for record in records for text in record.get("warnings") or ()]
    for prediction in (record.get("prediction") or {} for record in records):
        if prediction.get("plausible") is False:
            texts.append(f"implausible: {prediction.get('why')}")
    found = Counter(texts).items()
    return [f"{name}: {n} of {len(records)} records warn: {text}" for text, n in found]
