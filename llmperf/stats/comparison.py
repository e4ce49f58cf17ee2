"""Is one set of records faster than another? A ratio with its interval, or why there is none."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmperf.stats.samples import ratio_interval

# Fields of the condition in which two sets of records must agree before their speeds compare.
COMPARED = ("model", "weights", "dtype", "quantization", "prompt_tokens", "new_tokens", "sampling")
TOKEN_TOLERANCE = 0.01  # of the tokens that came out; beyond it different work was done


@dataclass(frozen=True)
class SpeedComparison:
    """a against b: `ratio` is median(a) / median(b) of the quantity, whatever its direction."""

    verdict: str  # a is "faster" or "slower" than b, or "cannot tell"
    ratio: float | None
    low: float | None
    high: float | None
    reason: str | None = None  # why there is no interval


def compare_speeds(
    a_records: Iterable,
    b_records: Iterable,
    quantity: str = "output_tokens_per_s",
    paired: bool = True,
    margin: float = 0.0,
) -> SpeedComparison:
    """Is a faster than b in `quantity` (a metric with its unit, or e.g. "ttft_ms.median")?

    Only records that count are used. Where both sides ran in the same rounds of one run they are
    compared in pairs, unless `paired` is False. A ratio within `margin` of 1 is "cannot tell".
    Raises ValueError when a field of COMPARED or the number of tokens differs, and for a quantity
    that is no rate, no time, or in no record.
    """
    sides = [[r for r in records if r.counts] for records in (a_records, b_records)]
    _check_comparable(*sides)
    name = quantity.split(".")[0]
    if not name.endswith(("_per_s", "_ms", "_s")):
        raise ValueError(f"{quantity!r} is no rate and no time: compare e.g. output_tokens_per_s")
    known = [[(r, v) for r in side if (v := r.metric(quantity)) is not None] for side in sides]
    if any(sides) and not any(known):
        raise ValueError(f"no record has the number {quantity}: try {quantity}.median")
    x, y = ({(r.run_id, r.repeat): v for r, v in side} for side in known)
    once = (len(x), len(y)) == tuple(map(len, sides))
    paired = paired and once and x.keys() == y.keys() and all(run for run, _ in x)
    a, b = ([v for _, v in side] for side in known)
    if paired:
        a, b = list(x.values()), [y[round] for round in x]
    found = ratio_interval(a, b, paired=paired)
    verdict = "cannot tell"
    if found.low is not None and (found.low > 1 + margin or found.high < 1 / (1 + margin)):
        verdict = "faster" if (found.low > 1) == name.endswith("_per_s") else "slower"
    return SpeedComparison(verdict, found.value, found.low, found.high, found.reason)


def _check_comparable(a: Sequence, b: Sequence) -> None:
    if not a or not b:
        return
    differs = []
    conditions = {id(r.condition): r.condition for r in (*a, *b)}.values()  # records share them
    for key in COMPARED:
        values = {json.dumps(c.get(key), sort_keys=True, default=str) for c in conditions}
        if len(values) > 1:
            differs.append(f"{key} ({', '.join(sorted(values))})")
    tokens = [
        np.median([(r.metric("output_tokens") or 0) / (r.metric("requests_ok") or 1) for r in side])
        for side in (a, b)
    ]
    if max(tokens) - min(tokens) > TOKEN_TOLERANCE * max(tokens):
        differs.append(f"output_tokens a request ({tokens[0]:.4g}, {tokens[1]:.4g})")
    if differs:
        raise ValueError(f"the records differ in {'; '.join(differs)}: compare equal work")
