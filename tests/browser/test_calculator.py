"""The calculator's page in Chromium: its numbers are those of Python, and its form works."""

import random
import shutil
from dataclasses import replace

import pytest

from llmperf import models, predict
from llmperf.predict import fits
from llmperf.show.widgets import Question
from llmperf.study.cli import main

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium to open the page in"),
]
CASES = 1000


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, as the command writes it, opened from a file without a network."""
    file = tmp_path_factory.mktemp("calculator") / "page.html"
    assert main(["calculator", "--out", str(file)]) == 0
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(error))
        page.route("http*://**", lambda route: errors.append(route.request.url))
        page.goto(file.as_uri())
        yield page
        browser.close()
    assert not errors


def random_questions(page) -> list[Question]:
    chance = random.Random(0)
    words = page.evaluate("[data.quantizations, Object.keys(data.item), Object.keys(data.cards)]")
    return [
        Question(
            model=chance.choice(models.PRESETS),
            quantization=chance.choice(words[0]),
            dtype=chance.choice(words[1]),
            card=chance.choice(words[2]),
            batch=round(2 ** chance.uniform(0, 12)),
            context=round(2 ** chance.uniform(1, 17)),
            processes=chance.choice([1, 1, 1, 2, 3, 16]),
            platform=chance.choice(["linux", "wsl2", "windows", "cpu"]),
        )
        for _ in range(CASES)
    ]


def test_the_numbers_are_those_of_python(page):
    questions = random_questions(page)
    asked = [vars(q) for q in questions]
    ledgers = page.evaluate("asked => asked.map(ledger)", asked)
    read = page.evaluate("asked => asked.map(stepBytes)", asked)
    for q, lines, step in zip(questions, ledgers, read, strict=True):
        expected = [(x.name, x.low, x.high) for x in predict.memory(q.spec()).lines]
        assert [tuple(line) for line in lines] == expected, q
        one = replace(q.spec(), rows=1, processes=1)
        assert step == pytest.approx(predict.decode_bound(one, q.context - 1, 1.0).bytes), q


def test_the_largest_batch_is_that_of_python(page):
    for q in random_questions(page)[:50]:
        gib = page.evaluate("q => data.cards[q.card][0]", vars(q))
        expected = fits.largest(q.spec(), "rows", int(gib * predict.GIB))
        asked = {**vars(q), "card_gib": gib}
        script = "q => [2, 1].map(i => largest(q, 'batch', 65536, i))"
        assert page.evaluate(script, asked) == list(expected), q
        for bound, i in (("high", 2), ("low", 1)):
            found = page.evaluate("([q, i]) => largest(q, 'context', 9999, i)", [asked, i])
            room = gib * predict.GIB
            fits_at = [getattr(predict.memory(replace(q, context=n).spec()), bound) <= room
                       for n in (max(2, found), found + 1)]  # fmt: skip
            assert fits_at[0] or found == 1, q
            assert not fits_at[1] or found == 9999, q


def test_a_change_answers_anew_and_a_wrong_entry_removes_the_old_answer(page):
    page.select_option("#model", "yi-34b-chat")
    page.select_option("#card", "RTX 4090")
    assert "yi-34b-chat does not fit" in page.inner_text("#verdict")
    page.select_option("#card", "H200 SXM")
    assert "yi-34b-chat fits" in page.inner_text("#verdict")
    assert page.input_value("#card_gib") == "141"
    assert "tokens/s" in page.inner_text("#advice")
    page.fill("#batch", "0")
    assert page.inner_text("#verdict").startswith("Requests in a batch:")
    assert not page.inner_text("#lines") and not page.inner_text("#advice")
    page.fill("#batch", "1")
    assert "fits" in page.inner_text("#verdict") and "weights" in page.inner_text("#lines")
    page.select_option("#card", "another")
    assert "Give the memory bandwidth" in page.inner_text("#advice")
    page.fill("#bandwidth", "500")
    assert "at 500 GB/s" in page.inner_text("#advice")
    page.fill("#card_gib", "23.98828125")  # as a driver reports 24 GiB
    assert "of 23.99 GiB" in page.inner_text("#verdict")
    page.fill("#card_gib", "2")
    assert "does not fit: it takes" in page.inner_text("#verdict")
    assert "No batch fits" in page.inner_text("#advice")
    page.select_option("#platform", "linux")
    page.select_option("#card", "this computer (free memory)")
    assert page.input_value("#platform") == "cpu" and float(page.input_value("#card_gib")) > 0.5
    assert "workspaces" not in page.inner_text("#lines")
    page.select_option("#card", "RTX 4090")
    assert page.input_value("#platform") == "linux"
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
