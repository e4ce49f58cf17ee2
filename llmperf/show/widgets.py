"""The memory calculator: a form that redraws a stacked ledger, and the same figure without a form.

The form is only another way to make a `Question`; `draw` answers it in both cases.
"""

from __future__ import annotations

import html
import io
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmperf import models, predict
from llmperf.predict import GIB
from llmperf.show import plots

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure

DTYPES = ("fp16", "bf16", "fp32")
QUANTIZATIONS = ("as stored", "none", "awq", "gptq", "gptq-8", "bnb-8", "bnb-4")
PLATFORMS = ("linux", "wsl2", "windows")
ANSWER_SHARE = 4  # one token in four of a context is generated, the others are the prompt
TEXT_COLUMNS = 110  # characters of a line under the figure


@dataclass(frozen=True)
class Question:
    """Does this fit? `context` counts prompt and answer; `memory_gib` is for an unknown card."""

    model: str = "yi-34b-chat-4bits"
    dtype: str = "fp16"
    quantization: str = "as stored"
    card: str = "RTX 3090"
    batch: int = 4
    context: int = 2048
    processes: int = 1
    platform: str = "linux"
    memory_gib: float | None = None

    def run(self) -> predict.RunSpec:
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


@dataclass(frozen=True)
class Answer:
    """The card, sentences with the verdict first, and the ledgers to draw, as asked first."""

    card: predict.Card
    sentences: tuple[str, ...]
    books: dict[str, predict.Ledger]


def answer(question: Question) -> Answer:
    """Does it fit, and what would: ValueError in one sentence for a card or model not known."""
    card = predict.card(question.card, question.memory_gib)
    run = question.run()
    book = predict.memory(run)
    said = [*predict.advise(run, card), *(f"Note: {w}." for w in book.warnings)]
    books = {"as asked": book}
    size = int(card.memory_gib * GIB)
    if book.high > size:
        books |= _smaller(question, run, size)
    return Answer(card, tuple(said), books)


def _smaller(q: Question, run: predict.RunSpec, size: int) -> dict[str, predict.Ledger]:
    """What surely fits when one thing is made smaller."""
    counts = {"batch": "rows", "context": "prompt_tokens", "processes": "processes"}
    found = {k: predict.largest(run, count, size).surely for k, count in counts.items()}
    found["context"] += run.new_tokens * (found["context"] > 0)
    unit = {"batch": "batch {:,}", "context": "{:,} tokens", "processes": "{:,} process(es)"}
    fits = {name: n for name, n in found.items() if 0 < n < getattr(q, name)}
    runs = {name: _run_with(q, run, name, n) for name, n in fits.items()}
    return {unit[k].format(fits[k]): predict.memory(r) for k, r in runs.items()}


def _run_with(q: Question, run: predict.RunSpec, name: str, n: int) -> predict.RunSpec:
    """The run with one number changed. A shorter context shortens the prompt, not the answer."""
    if name == "context":
        return replace(run, prompt_tokens=n - run.new_tokens)
    return replace(q, **{name: n}).run()


def draw(question: Question) -> Figure:
    """The figure: a bar as asked, bars for what would fit, the card's size, and the sentences."""
    found = answer(question)
    fig, ax = plots.figure(height=2.6 + 0.35 * len(found.books))
    plots.ledgers(ax, found.books)
    card, q = found.card, question
    ax.axvline(card.memory_gib, color="black", linestyle="--", label=f"{card.memory_gib:g} GiB")
    plots.legend(ax)
    ax.set_xlim(0, 1.03 * max(card.memory_gib, *(b.high / GIB for b in found.books.values())))
    many = f", {q.processes} processes" if q.processes > 1 else ""
    words = f"batch {q.batch:,}, {q.context:,} tokens{many} on {card.name}"
    ax.set_title(f"{q.model}, {words}: {_verdict(found)}", fontsize=10, loc="left")
    text = "\n".join(textwrap.fill(s, TEXT_COLUMNS) for s in found.sentences)
    fig.supxlabel(text, fontsize=8, color="#57606a", x=0.01, ha="left")
    return fig


def _verdict(found: Answer) -> str:
    return predict.judge(found.books["as asked"], int(found.card.memory_gib * GIB)).verdict


def calculator(start: Question | None = None) -> ipywidgets.VBox:
    """The form. Every change redraws the figure, or says in one sentence what is wrong."""
    import ipywidgets as w

    q = start or Question()
    fields = {
        "model": w.Combobox(value=q.model, options=models.PRESETS, ensure_option=False),
        "dtype": w.Dropdown(value=q.dtype, options=DTYPES),
        "quantization": w.Dropdown(value=q.quantization, options=QUANTIZATIONS),
        "card": w.Combobox(value=q.card, options=predict.card_names(), ensure_option=False),
        "memory_gib": w.FloatText(value=q.memory_gib or 0),
        "platform": w.Dropdown(value=q.platform, options=PLATFORMS),
        "batch": w.IntSlider(value=q.batch, min=1, max=64),
        "context": w.IntSlider(value=q.context, min=64, max=8192, step=64),
        "processes": w.IntSlider(value=q.processes, min=1, max=16),
    }
    for name, field in fields.items():
        field.description = "card GiB" if name == "memory_gib" else name
        field.continuous_update = False
    said, picture = w.HTML(), w.Image(format="png")

    def redraw(_change=None) -> None:
        values = {name: field.value for name, field in fields.items()}
        try:
            picture.value = png(Question(**values | {"memory_gib": values["memory_gib"] or None}))
            said.value = ""
        except ValueError as error:
            said.value = html.escape(str(error))

    for field in fields.values():
        field.observe(redraw, names="value")
    redraw()
    columns = [list(fields.values())[i : i + 3] for i in (0, 3, 6)]
    return w.VBox([w.HBox([w.VBox(column) for column in columns]), said, picture])


def png(question: Question) -> bytes:
    """The figure of `draw` as an image; it is closed again, so that Jupyter shows it once."""
    import matplotlib.pyplot as plt

    fig, data = draw(question), io.BytesIO()
    fig.savefig(data, format="png", dpi=100)
    plt.close(fig)
    return data.getvalue()
