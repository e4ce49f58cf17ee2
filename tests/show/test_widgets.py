"""The forms: every change redraws, and what is wrong is said in one sentence."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from llmperf import models, predict
from llmperf.decoding.requests import build
from llmperf.measure import capacity
from llmperf.show import widgets
from llmperf.show.widgets import Question


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def form():
    """The fields of the form by their names."""
    *fields, _output = widgets.calculator().children
    return {field.description: field for field in fields}


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 8), ("context", 512), ("processes", 2), ("card", "RTX 4090"), ("dtype", "fp32"),
     ("quantization", "bnb-8"), ("model", "gpt2"), ("platform", "windows"), ("card_gib", 12.0)],
)  # fmt: skip
def test_every_field_redraws(form, field, value, monkeypatch):
    asked = []
    monkeypatch.setattr(
        widgets, "draw_memory", lambda question: asked.append(question) or plt.figure()
    )
    form[field].value = value
    assert asked == [Question(**{field: value})]
    assert plt.get_fignums() == [], "a figure left open is shown a second time"


def test_an_unknown_card_asks_for_its_size_and_names_the_known(form, capsys):
    form["card"].value = "My Card 9000"
    said = capsys.readouterr().out
    assert "memory_gib=" in said and "RTX 3090" in said and "Figure" not in said
    form["card_gib"].value = 48.0
    assert "memory_gib=" not in capsys.readouterr().out


def test_an_unknown_model_names_the_presets(form, capsys):
    form["model"].value = "gpt-17"
    said = capsys.readouterr().out
    assert "unknown model" in said and "yi-6b-chat" in said


def test_one_look_answers_the_question_of_yi_34b():
    fig = widgets.draw_memory(Question())
    assert fig.axes[0].get_title(loc="left") == (
        "yi-34b-chat-4bits, batch 4, 2,048 tokens on RTX 3090: might fit"
    )
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert {"weights", "kv cache", "up to", "24 GiB"} <= set(labels)
    assert "surely holds it" in fig.get_supxlabel()


def test_the_bar_adds_up_to_the_ledger():
    fig = widgets.draw_memory(Question())
    widest = max(bar.get_x() + bar.get_width() for bar in fig.axes[0].patches)
    assert widest == pytest.approx(predict.memory(Question().spec()).high / predict.GIB)


def test_a_context_beyond_the_positions_is_noted():
    assert "beyond the 1024 positions" in " ".join(
        widgets.draw_memory(Question(model="gpt2", context=4096)).get_supxlabel().split()
    )
    with pytest.raises(ValueError, match="context is 1: give 2"):
        widgets.draw_memory(Question(context=1))


def test_context_counts_prompt_and_answer():
    run = Question(context=2048).spec()
    assert run.prompt_tokens + run.new_tokens == 2048


LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0] + [-9.0] * 252])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "survivors", "likeliest"),
    [
        (1.0, 50, 1.0, "50 tokens", 0.64),
        (1.0, 0, 1.0, "256 tokens", 0.64),
        (1.0, 1, 1.0, "1 token", 1.0),
        (1.0, 50, 0.7, "2 tokens", 0.73),
        (0.1, 50, 0.9, "1 token", 1.0),
    ],
)
def test_the_draw_of_a_token_shows_what_survives(temperature, top_k, top_p, survivors, likeliest):
    fig = widgets.draw_sampling(LOGITS, models.byte_tokenizer(), temperature, top_k, top_p)
    assert fig.axes[0].get_title(loc="left") == f"{survivors} can be drawn"
    before, after = fig.axes[0].containers
    assert before[0].get_height() == pytest.approx(0.64, abs=0.01)
    assert after[0].get_height() == pytest.approx(likeliest, abs=0.01)


LIMITS = {"read_bytes_per_s": {"median": 1e11}, "flops_per_s": {"bf16": {"median": 1e12}}}


@pytest.mark.parametrize(
    ("dtype", "batch", "limit"),
    [("bf16", 1, "bandwidth"), ("bf16", 99, "arithmetic"), ("fp16", 99, "bandwidth")],
)
def test_a_step_lies_on_the_roof_of_the_machine(dtype, batch, limit):
    """Where no rate of arithmetic was measured, only the slope is drawn."""
    shape = models.shape_of("gpt2")
    fig = widgets.draw_roofline(shape, LIMITS, dtype, batch)
    spec = predict.RunSpec(shape, dtype, rows=batch)
    flops = 1e12 if dtype == "bf16" else None
    least = predict.decode_bound(spec, 64, 1e11, flops)
    assert least.limit == limit and f"{limit} sets it" in fig.axes[0].get_title(loc="left")
    dot = fig.axes[0].lines[-1]
    assert dot.get_xdata()[0] == pytest.approx(least.flops / least.bytes)
    assert dot.get_ydata()[0] == pytest.approx(least.flops / least.seconds / 1e9)


@pytest.mark.parametrize(
    ("rate", "cards", "share"), [(1.0, 1, "100%"), (50.0, 1, "20%"), (50.0, 9, "100%")]
)
def test_the_queue_grows_with_the_rate_and_shrinks_with_cards(rate, cards, share):
    curve = capacity.Curve((1,), (0.05,), (0.05,))  # 5 requests/s, one at a time
    work = build(models.byte_tokenizer(), 20, 8, 3)
    fig = widgets.draw_queue(work, curve, {"ttft_ms": 500.0}, rate, cards, 1)
    assert share in fig.axes[0].get_title(loc="left")


def test_a_form_takes_its_first_values_from_the_function():
    drawn = []
    form = widgets.explore(lambda rate=3.0: drawn.append(rate) or plt.figure(), rate=(1.0, 9.0))
    slider, _output = form.children
    assert slider.value == 3.0 and not slider.continuous_update
    slider.value = 5.0
    assert drawn[-1] == 5.0 and plt.get_fignums() == []


@pytest.mark.parametrize(("asked", "marked"), [(4, 4), (5, 4), (99, 8)])
def test_a_batch_size_is_marked_with_what_it_gives(asked, marked):
    rows = [(n, 10.0 + n, 90.0 * n, "ok") for n in (1, 4, 8)] + [(16, None, None, "oom")]
    frame = pd.DataFrame(rows, columns=["level", "tpot_ms", "output_tokens_per_s", "status"])
    fig = widgets.draw_batch(frame, asked)
    title = fig.axes[0].get_title(loc="left")
    assert title == (
        f"batch {marked}: {90 * marked} tokens/s for all, {1e3 / (10 + marked):.0f} for each user"
    )
    (point,) = fig.axes[0].lines[1].get_xydata()
    assert tuple(point) == pytest.approx((1e3 / (10 + marked), 90 * marked))
