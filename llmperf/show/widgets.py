"""The memory calculator: a form that draws a predicted ledger, and the same figure without it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

from llmperf import models, predict
from llmperf.predict import GIB
from llmperf.show import plots

ANSWER_SHARE = 4  # one token in four of a context is generated, the others are the prompt
TEXT_COLUMNS = 110  # characters of a line under the figure
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


def draw(question: Question) -> Figure:
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
    text = "\n".join(textwrap.fill(s, TEXT_COLUMNS) for s in sentences)
    fig.supxlabel(text, fontsize=8, color="#57606a", x=0.01, ha="left")
    return fig


def calculator() -> ipywidgets.Widget:
    """The form. Every change redraws the figure, or says in one sentence what is wrong."""
    w, q, late = ipywidgets, Question(), {"continuous_update": False}

    def redraw(**values) -> None:
        try:
            fig = draw(Question(**values))
        except ValueError as error:
            print(error)
        else:
            display(fig)
            plt.close(fig)  # a figure left open would be shown a second time

    return w.interactive(
        redraw,
        model=w.Combobox(value=q.model, options=models.PRESETS, **late),
        dtype=["fp16", "bf16", "fp32"],
        quantization=QUANTIZATIONS,
        card=w.Combobox(value=q.card, options=predict.card_names(), **late),
        card_gib=w.FloatText(value=q.card_gib),
        platform=["linux", "wsl2", "windows"],
        batch=w.IntSlider(value=q.batch, min=1, max=64, **late),
        context=w.IntSlider(value=q.context, min=64, max=8192, step=64, **late),
        processes=w.IntSlider(value=q.processes, min=1, max=16, **late),
    )
