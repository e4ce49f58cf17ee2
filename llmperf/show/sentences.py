"""What the numbers of this run say, in words; and how a reader's guess compares."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from llmperf import stats
from llmperf.machine import significant
from llmperf.measure import Record, metrics
from llmperf.stats import Interval

WORDS = {
    "output_tokens_per_s": "tokens/s",
    "duration_s": "time",
    "ttft_ms": "time to the first token",
    "tpot_ms": "time per output token",
    "e2el_ms": "time until the whole answer",
    "max_rss_bytes": "memory (RSS)",
}


def ratio_sentence(
    frame: pd.DataFrame,
    quantity: str,
    a: str | Mapping,
    b: str | Mapping,
    *,
    names: tuple[str, str] | None = None,
    than: float = 1.0,
    more: str = "more",
    less: str = "less",
    unclear: str = "cannot tell whether more or less",
) -> str:
    """`batch of 10: 4.2 (3.9 to 4.5) times the tokens/s of batch of 1, more`.

    `a`, `b` and `quantity` are those of `ratio`. `more`, `less` and `unclear` end the sentence when
    the 95 % interval lies above `than`, below it, or around it; `unclear` too where the rounds are
    too few for one.
    """
    names = names or tuple(s if isinstance(s, str) else str(dict(s)) for s in (a, b))
    of = WORDS.get(quantity, quantity.replace("_", " "))
    for name, side in zip(names, (a, b), strict=True):
        if _samples(frame, quantity, side).empty:
            return f"not measured: the {of} of {name}."
    found = ratio(frame, quantity, a, b)
    end = _outcome(found, than, more, less, unclear)
    return f"{names[0]}: {_shown(found)} times the {of} of {names[1]}, {end}."


def ratio(frame: pd.DataFrame, quantity: str, a: str | Mapping, b: str | Mapping) -> Interval:
    """The ratio of `quantity`, rows of `a` over rows of `b`; each is a label, or maps columns to
    values. Where two or more rounds hold both, they are compared in pairs. If `a` or `b` has no
    runs, the value is None."""
    left, right = (_samples(frame, quantity, side) for side in (a, b))
    common = left.index.intersection(right.index)
    if pairs := len(common) > 1:
        left, right = left[common], right[common]
    return stats.ratio_interval(left.tolist(), right.tolist(), paired=pairs)


def value_sentence(
    what: str,
    samples: float | Sequence[float] | pd.Series | None,
    limit: float,
    *,
    above: str,
    below: str,
    unclear: str = "cannot tell which side of {limit}",
    unit: str = "",
) -> str:
    """`GIL contention of 10 threads: 0.42 (0.38 to 0.47), above`, for any quantity.

    One number is compared as it is, several by the 95 % interval of their median.
    """
    values = pd.Series(samples, dtype=float).dropna()
    if values.empty:
        return f"{what}: not measured."
    found = stats.median_interval(values.tolist())
    if pd.api.types.is_scalar(samples):
        found = Interval(found.value, found.value, found.value, 1)
    end = _outcome(found, limit, above, below, unclear.format(limit=f"{significant(limit)}{unit}"))
    return f"{what}: {_shown(found)}{unit}, {end}."


def agreement_sentence(frame: pd.DataFrame) -> str:
    """In how many requests the tokens are those of `sequential`."""
    if "agree" not in frame or not (total := int(frame.compared.sum())):
        return "Tokens: not compared with sequential."
    if (agree := int(frame.agree.sum())) == total:
        return f"Tokens: the same as in sequential in all {total} requests that were compared."
    parted = ", ".join(frame[frame.agree < frame.compared].label.unique())
    return f"Tokens: {agree} of {total} requests agree with sequential; not in {parted}."


def loops_sentence(records: Iterable[Record]) -> str:
    """Which decoding loop was asked for and which one ran, and why another."""
    found = {}  # a dictionary keeps the order
    for r in records:
        asked, ran, why = r.condition.get("loop"), r.notes.get("loop"), r.notes.get("fallback")
        if r.status == "ok" and ran:
            other = f"{asked} ran as {ran} ({why or 'no reason is noted'})"
            same = f"{ran} ran as asked" + f" ({why})" * bool(why)
            found[same if ran == asked else other] = None
    return f"Loops: {'; '.join(found) or 'not noted in these runs'}."


def guess_sentence(
    what: str, guess: float | None, measured: float | None, unit: str = "", right: float = 0.1
) -> str:
    """How a reader's guess compares with what was measured: right within a share of it."""
    if measured is None or math.isnan(measured):
        return f"{what}: not measured."
    found = f"{what}: {significant(measured)}{unit}"
    if guess is None:
        return f"{found}. No guess was written down above."
    if type(guess) not in (int, float) or not math.isfinite(guess):
        return f"{found}. Your guess {guess!r} is no number: write it without its unit."
    if abs(guess - measured) <= right * abs(measured):
        return f"{found}. Your guess, {guess:g}{unit}, was right."
    much = "" if measured and 0.5 <= guess / measured <= 2 else "much "
    side = "high" if guess > measured else "low"
    return f"{found}. Your guess, {guess:g}{unit}, was {much}too {side}."


def longer_load_sentence(rate_per_s: float, requests: int, longer: int, share: float) -> str:
    """Whether a rate that held in a run of `requests` holds in a longer one too. `share`: of the
    `longer` simulated requests those that were in time."""
    took = [f"{n} requests ({(n - 1) / rate_per_s:.1f} s of arrivals)" for n in (requests, longer)]
    end = (
        "the simulation finds that this rate holds in the longer run too"
        if share >= metrics.SHARE
        else "the queue grows in the longer run, and the highest rate that holds there is lower"
    )
    held = f"{rate_per_s:.1f} requests/s held for {took[0]}"
    return f"{held}. Simulated with {took[1]}, {share:.0%} are in time: {end}."


def _samples(frame: pd.DataFrame, quantity: str, side: str | Mapping) -> pd.Series:
    """The values above 0 of the rows that `side` names, one a round."""
    if quantity not in frame:
        return pd.Series(dtype=float)
    rows = frame[frame.status == "ok"]
    for column, value in ({"label": side} if isinstance(side, str) else side).items():
        rows = rows[rows[column] == value] if column in rows else rows.iloc[:0]
    rows = rows[rows[quantity] > 0]
    return rows.groupby([c for c in ("run_id", "repeat") if c in rows])[quantity].median()


def _outcome(found: Interval, limit: float, above: str, below: str, unclear: str) -> str:
    if found.low is None:
        return f"cannot tell: {found.reason}"
    return above if found.low > limit else below if found.high < limit else unclear


def _shown(found: Interval) -> str:
    three = (found.value, found.low, found.high)
    value, *ends = ("" if v is None else significant(v) for v in three)
    return value if len({*ends}) == 1 else f"{value} ({ends[0]} to {ends[1]})"
