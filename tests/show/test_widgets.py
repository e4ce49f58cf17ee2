"""The calculator: every change redraws, and what is wrong is said in one sentence."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from llmperf import predict
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
    monkeypatch.setattr(widgets, "draw", lambda question: asked.append(question) or plt.figure())
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
    fig = widgets.draw(Question())
    assert fig.axes[0].get_title(loc="left") == (
        "yi-34b-chat-4bits, batch 4, 2,048 tokens on RTX 3090: might fit"
    )
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert {"weights", "kv cache", "up to", "24 GiB"} <= set(labels)
    assert "surely holds it" in fig.get_supxlabel()


def test_the_bar_adds_up_to_the_ledger():
    fig = widgets.draw(Question())
    widest = max(bar.get_x() + bar.get_width() for bar in fig.axes[0].patches)
    assert widest == pytest.approx(predict.memory(Question().spec()).high / predict.GIB)


def test_a_context_beyond_the_positions_is_noted():
    assert "beyond the 1024 positions" in " ".join(
        widgets.draw(Question(model="gpt2", context=4096)).get_supxlabel().split()
    )
    with pytest.raises(ValueError, match="context is 1: give 2"):
        widgets.draw(Question(context=1))


def test_context_counts_prompt_and_answer():
    run = Question(context=2048).spec()
    assert run.prompt_tokens + run.new_tokens == 2048
