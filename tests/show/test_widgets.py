"""The calculator: every change redraws, and what is wrong is said in one sentence."""

import struct

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
    """The form as a reader meets it: fields by their description, the message, the image."""
    columns, said, picture = widgets.calculator().children
    fields = {f.description: f for column in columns.children for f in column.children}
    return fields, said, picture


def test_the_form_begins_with_a_figure(form):
    fields, said, picture = form
    assert picture.value == widgets.png(Question()) and said.value == ""
    width, height = struct.unpack(">II", picture.value[16:24])
    assert width > 500 and height > 200
    assert plt.get_fignums() == [], "a figure left open is shown a second time"


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 8), ("context", 512), ("processes", 2), ("card", "RTX 4090"), ("dtype", "fp32"),
     ("quantization", "bnb-8"), ("model", "gpt2"), ("platform", "windows"), ("card GiB", 12.0)],
)  # fmt: skip
def test_every_field_redraws_what_the_twin_would(form, field, value):
    fields, said, picture = form
    before = picture.value
    fields[field].value = value
    name = "memory_gib" if field == "card GiB" else field
    assert picture.value == widgets.png(Question(**{name: value})) != before
    assert said.value == ""


def test_an_unknown_card_asks_for_its_size_and_names_the_known(form):
    fields, said, picture = form
    before = picture.value
    fields["card"].value = "My <b>Card</b> 9000"
    assert "memory_gib=" in said.value and "RTX 3090" in said.value
    assert "<b>" not in said.value and picture.value == before
    fields["card GiB"].value = 48.0
    assert said.value == "" and picture.value != before


def test_an_unknown_model_names_the_presets(form):
    fields, said, _ = form
    fields["model"].value = "gpt-17"
    assert "unknown model" in said.value and "yi-6b-chat" in said.value
    fields["model"].value = "gpt2"
    assert said.value == ""


def test_one_look_answers_the_question_of_yi_34b():
    found = widgets.answer(Question())
    assert list(found.books) == ["as asked", "batch 3", "1,898 tokens"]
    size = 24 * predict.GIB
    assert found.books["as asked"].low < size < found.books["as asked"].high
    assert all(b.high <= size for label, b in found.books.items() if label != "as asked")
    assert found.sentences[-1] == "RTX 5090 (32 GiB) surely holds it."
    fig = widgets.draw(Question())
    assert fig.axes[0].get_title(loc="left") == (
        "yi-34b-chat-4bits, batch 4, 2,048 tokens on RTX 3090: might fit"
    )
    labels = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
    assert {"weights", "kv cache", "up to", "24 GiB"} <= set(labels)
    assert "surely holds it" in fig.get_supxlabel()


def test_the_bars_add_up_to_the_ledger():
    fig = widgets.draw(Question())
    widest = {}
    for bar in fig.axes[0].patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        widest[row] = max(widest.get(row, 0), bar.get_x() + bar.get_width())
    books = widgets.answer(Question()).books.values()
    assert list(widest.values()) == pytest.approx([b.high / predict.GIB for b in books])


def test_what_fits_needs_no_advice_and_processes_are_offered_fewer():
    small = widgets.answer(Question(model="gpt2", context=512))
    assert list(small.books) == ["as asked"] and len(small.sentences) == 1
    many = widgets.answer(Question(model="gpt2", dtype="fp32", batch=1, context=512, processes=16,
                                   card="RTX A2000 Laptop 4GB"))  # fmt: skip
    assert any("process(es)" in label for label in many.books)


def test_a_context_beyond_the_positions_is_noted():
    said = widgets.answer(Question(model="gpt2", context=4096)).sentences
    assert any("beyond the 1024 positions" in s for s in said)
    with pytest.raises(ValueError, match="context is 1: give 2"):
        widgets.answer(Question(context=1))


def test_context_counts_prompt_and_answer():
    run = Question(context=2048).run()
    assert run.prompt_tokens + run.new_tokens == 2048
    assert predict.memory(Question(model="gpt2").run()).line("kv cache").low > 0
