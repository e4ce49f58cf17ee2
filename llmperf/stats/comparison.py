"""Is one set of records faster than another? A ratio with its interval, or why there is none."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmperf.stats.intervals import ratio_interval

# What two sets of records must share before their speeds say anything about each other.
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
    paired: bool = False,
    higher_is_better: bool | None = None,
) -> Comparison:
    """Is a faster than b in `quantity` (a key of the records' metrics, or e.g. "ttft_ms.median")?

    Records are Record or its dict; only `ok` measured ones count. `paired=True` pairs them by
    their `repeat`. Raises
    Incomparable, a ValueError, when a key of COMPARED differs and is not in `allow`.
    """
    a, b = _measured(a_records), _measured(b_records)
    _check_comparable(a, b, allow)
    better = _direction(quantity) if higher_is_better is None else higher_is_better
    notes = [note for name, rows in (("a", a), ("b", b)) for note in _warned(name, rows)]
    if paired:
        a, b = _pairs(a, b)
    x, y = _values(a, quantity), _values(b, quantity)
    if paired and (len(x) != len(a) or len(y) != len(b)):
        raise ValueError(f"a pair lacks {quantity}; compare with paired=False")
    found = ratio_interval(x, y, confidence, paired=paired)
    verdict = "cannot tell"
    if found.low is not None and (found.low > 1 or found.high < 1):
        verdict = "faster" if (found.low > 1) == better else "slower"
    notes += [found.reason] if found.reason else []
    interval = (found.value, found.low, found.high)
    return Comparison(quantity, verdict, *interval, confidence, (len(x), len(y)), tuple(notes))


def _measured(records: Iterable) -> list[dict]:
    rows = [r if isinstance(r, dict) else vars(r) for r in records]
    return [
        r for r in rows if r.get("status", "ok") == "ok" and r.get("kind", "measure") == "measure"
    ]


def _check_comparable(a: list[dict], b: list[dict], allow: Sequence[str]) -> None:
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    unknown = set(allow) - set(COMPARED)
    if unknown:
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


def _tokens(records: list[dict]) -> list[float]:
    rows = [r.get("metrics") or {} for r in records]
    return [m["output_tokens"] / m["requests_ok"] for m in rows if m.get("requests_ok")]


def _direction(quantity: str) -> bool:
    leaf = [part for part in quantity.split(".") if "_" in part][-1:] or [quantity]
    if leaf[0].endswith(("_per_s", "_per_user")):
        return True
    if leaf[0].endswith(("_ms", "_s")):
        return False
    raise ValueError(f"which way of {quantity!r} is better is not known; pass higher_is_better")


def _values(records: list[dict], quantity: str) -> list[float]:
    found = []
    for record in records:
        value = record.get("metrics") or {}
        for part in quantity.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            raise ValueError(f"{quantity} is a block; name a number in it: {quantity}.median")
        found += [] if value is None else [value]
    return found


def _pairs(a: list[dict], b: list[dict]) -> tuple[list[dict], list[dict]]:
    left, right = ({r.get("repeat"): r for r in side} for side in (a, b))
    if len(left) != len(a) or len(right) != len(b):
        raise ValueError("pairs need one record for each repeat on both sides")
    shared = sorted(left.keys() & right.keys())
    return [left[i] for i in shared], [right[i] for i in shared]


def _warned(name: str, records: list[dict]) -> list[str]:
    """What the records themselves warn of (instability, an implausible figure), counted."""
    texts = [str(text) for record in records for text in record.get("warnings") or ()]
    for prediction in (record.get("prediction") or {} for record in records):
        if prediction.get("plausible") is False:
            texts.append(f"implausible: {prediction.get('why')}")
    return [
        f"{name}: {texts.count(text)} of {len(records)} records warn: {text}"
        for text in dict.fromkeys(texts)
    ]
