"""Forms that draw again at every change, and their figures, which can be drawn without a form.

The memory calculator; a step under the roofline; the draw of a token; a batch size; a queue.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import wraps

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from llmperf import models, predict
from llmperf.decoding.requests import Workload
from llmperf.decoding.sampling import Sampling, filtered_logits
from llmperf.machine import significant
from llmperf.measure import capacity, load, metrics
from llmperf.predict import GIB
from llmperf.show import plots

ANSWER_SHARE = 4  # one token in four of a context is generated, the others are the prompt
TOKENS_SHOWN = 16
QUANTIZATIONS = ["as stored", "none", "awq", "gptq", "gptq-8", "bnb-8", "bnb-4"]


@dataclass(frozen=True)
class Question:
    """Does this fit? `context` counts prompt and answer; `card_gib` is for an unknown card."""

    model: str = "yi-34b-chat-4bits"
    dtype: str = "fp16"
    quantization: str = "as stored"
    card: str = "RTX 3090"
    batch: int = 4
    context: int = 2048
    processes: int = 1
    platform: str = "linux"
    card_gib: float = 0.0

    def spec(self) -> predict.RunSpec:
        """The run that the question is about."""
        if self.context < 2:
            raise ValueError(f"context is {self.context}: give 2 tokens or more")
        new = max(1, self.context // ANSWER_SHARE)
        return predict.RunSpec(
            models.shape_of(self.model),
            self.dtype,
            None if self.quantization == "as stored" else self.quantization,
            self.batch,
            self.context - new,
            new,
            processes=self.processes,
            platform=self.platform,
        )


def draw_memory(question: Question) -> Figure:
    """The ledger as a bar against the card's size, with the verdict and what would fit.

    Raises ValueError, one sentence, for a card or model that is not known.
    """
    q, spec = question, question.spec()
    card, book = predict.card(q.card, q.card_gib or None), predict.memory(spec)
    fig, ax = plots.figure(height=3)
    plots.ledgers(ax, {"": book})
    ax.axvline(card.memory_gib, color="black", linestyle="--", label=f"{card.memory_gib:g} GiB")
    plots.legend(ax)
    ax.set_xlim(0, 1.03 * max(card.memory_gib, book.high / GIB))
    verdict = predict.judge(book, int(card.memory_gib * GIB)).verdict
    many = f", {q.processes} processes" if q.processes > 1 else ""
    words = f"{q.model}, batch {q.batch:,}, {q.context:,} tokens{many} on {card.name}: {verdict}"
    ax.set_title(words, fontsize=10, loc="left")
    sentences = [*predict.advise(spec, card), *(f"Note: {text}." for text in book.warnings)]
    plots.caption(fig, origin="\n".join(sentences))
    return fig


def draw_sampling(
    logits, tokenizer, temperature: float = 1.0, top_k: int = 50, top_p: float = 0.9
) -> Figure:
    """The likeliest tokens of logits (1, vocabulary): before and after temperature, top-k, top-p.

    `top_k` 0: no limit. Raises ValueError for values that cannot be.
    """
    kept = filtered_logits(logits, Sampling(False, temperature, top_k or None, top_p)).softmax(-1)
    before, ids = logits.float().softmax(-1)[0].topk(TOKENS_SHOWN)
    fig, ax = plots.figure(height=3)
    words = [repr(tokenizer.decode([i])) for i in ids.tolist()]
    ax.bar(words, before.tolist(), color=plots.GREY, alpha=0.5, label="of the model")
    look = {"color": plots.COLORS[0], "label": "after temperature, top-k, top-p"}
    ax.bar(words, kept[0, ids].tolist(), width=0.4, **look)
    ax.set_ylabel("probability")
    ax.tick_params(axis="x", rotation=60)
    plots.legend(ax)
    survivors = int((kept > 0).sum())
    words = f"{survivors:,} token{'s' * (survivors > 1)} can be drawn"
    ax.set_title(words, fontsize=10, loc="left")
    return fig


def draw_roofline(
    shape: models.ModelShape, limits: Mapping, dtype: str, batch: int = 1, context: int = 64
) -> Figure:
    """Where a decode step of `batch` rows lies under the roof of a machine, and what it takes.

    `limits` is what `ceilings.measure` gives.
    """
    flops = limits["flops_per_s"].get(dtype)
    rates = limits["read_bytes_per_s"]["median"], flops and flops["median"]
    steps = {
        f"batch {n}": predict.decode_bound(predict.RunSpec(shape, dtype, rows=n), context, *rates)
        for n in sorted({1, batch})
    }
    points = pd.DataFrame([{"name": n, "dtype": dtype, **asdict(s)} for n, s in steps.items()])
    fig, ax = plots.figure(height=3.4)
    plots.roofline(ax, limits, points)
    least = steps[f"batch {batch}"]
    words = f"at least {significant(least.seconds * 1e3)} ms a step, {least.limit} sets it"
    speed = f"at most {batch / least.seconds:,.0f} tokens/s"
    ax.set_title(f"{words}: {speed}", fontsize=10, loc="left")
    return fig


def draw_batch(frame: pd.DataFrame, batch: int = 1) -> Figure:
    """Each batch size as a point: what one user gets against what all get together. `batch`, or the
    measured size next to it, is marked. `frame`: runs of the strategy `batch`."""
    of_all, tpot = "output_tokens_per_s", "tpot_ms"
    speeds = frame[frame.status == "ok"].groupby("level")[[tpot, of_all]].median()
    if speeds.empty:
        raise ValueError("no run of a batch went through")
    all_users, each = speeds[of_all], 1e3 / speeds[tpot]
    batch = min(each.index, key=lambda level: abs(level - batch))
    fig, ax = plots.figure(height=3)
    ax.plot(each, all_users, "-o", color=plots.GREY)
    ax.plot(each[batch], all_users[batch], "o", color=plots.COLORS[1], markersize=11)
    for level in each.index:
        at = (each[level], all_users[level])
        ax.annotate(str(level), at, (5, 4), textcoords="offset points", fontsize=8)
    ax.set(xlabel="tokens/s of each user, once its answer has begun", ylabel="tokens/s of all")
    ax.set(xlim=(0, None), ylim=(0, 1.2 * all_users.max()))
    words = (
        f"batch {batch}: {all_users[batch]:.0f} tokens/s for all, {each[batch]:.0f} for each user"
    )
    ax.set_title(words, fontsize=10, loc="left")
    return fig


def draw_queue(
    work: Workload,
    curve: capacity.Curve,
    slo: Mapping,
    rate_per_s: float,
    cards: int = 1,
    max_batch: int = 8,
    joins: bool = False,
) -> Figure:
    """When each simulated request had its first token, at a rate of Poisson arrivals.

    `curve` and `joins` are those of `capacity.simulate`.
    """
    arriving = load.arriving(work, "poisson", rate_per_s=rate_per_s, seed=0)
    trace = capacity.simulate(arriving, curve, cards=cards, max_batch=max_batch, joins=joins)
    rows = metrics.per_request(trace, "scheduled")
    waits = [row["ttft_ms"] / 1e3 for row in rows]
    fig, ax = plots.figure(height=3)
    ax.plot([r.scheduled_s for r in trace.requests], waits, ".", color=plots.COLORS[0])
    if "ttft_ms" in slo:
        ax.axhline(
            slo["ttft_ms"] / 1e3, color=plots.GREY, ls=":", label="limit of the service level"
        )
        plots.legend(ax)
    ax.set(xlabel="arrival (s)", ylabel="time to first token (s)", ylim=(0, None))
    met = sum(metrics.meets(row, slo) for row in rows) / len(rows)
    words = f"{significant(rate_per_s)} requests/s: {met:.0%} of the requests within every limit"
    ax.set_title(words, fontsize=10, loc="left")
    plots.caption(fig, note=f"{len(rows)} simulated requests, from the measured times of a batch")
    return fig


def explore(draw: Callable[..., Figure], **fields) -> ipywidgets.Widget:
    """A form of these fields. Every change redraws, or says in one sentence what is wrong."""

    @wraps(draw)  # a field takes its first value from the function
    def redraw(**values) -> None:
        try:
            fig = draw(**values)
        except ValueError as error:
            print(error)
        else:
            display(fig)
            plt.close(fig)  # a figure left open would be shown a second time

    form = ipywidgets.interactive(redraw, **fields)
    for field in form.children:
        if hasattr(field, "continuous_update"):
            field.continuous_update = False
    return form


def calculator() -> ipywidgets.Widget:
    """The form of `draw_memory`."""
    w, q = ipywidgets, Question()
    return explore(
        lambda **values: draw_memory(Question(**values)),
        model=w.Combobox(value=q.model, options=models.PRESETS),
        dtype=["fp16", "bf16", "fp32"],
        quantization=QUANTIZATIONS,
        card=w.Combobox(value=q.card, options=[card.name for card in predict.known_cards()]),
        card_gib=w.FloatText(value=q.card_gib),
        platform=["linux", "wsl2", "windows"],
        batch=w.IntSlider(value=q.batch, min=1, max=64),
        context=w.IntSlider(value=q.context, min=64, max=8192, step=64),
        processes=w.IntSlider(value=q.processes, min=1, max=16),
    )
