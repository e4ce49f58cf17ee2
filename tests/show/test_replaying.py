"""The replay: an animated SVG in which each token appears when it came."""

import base64
import re
from xml.etree import ElementTree

import pytest

from llmperf import models
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.show import replay, replay_svg
from llmperf.show.replaying import LASTS_S, WHOLE_S

TOKENIZER = models.byte_tokenizer()


def trace(*texts, step_s=0.1, start_s=0.0):
    """Requests one after another, a byte each `step_s`."""
    requests, now = [], start_s
    for i, text in enumerate(texts):
        tokens = tuple(TOKENIZER(text)["input_ids"])
        times = tuple(now + step_s * (n + 1) for n in range(len(tokens)))
        requests.append(RequestTrace(i, 4, 0.0, 0.0, now, times, tokens))
        now = times[-1]
    return Trace(tuple(requests), now)


def appearances(page):
    """Of each token its text, and when it appears, in seconds of the replay."""
    root = ElementTree.fromstring(page)
    spans = [e for e in root.iter() if e.get("class") == "t"]
    times = [e[0].get("keyTimes").split(";") for e in spans]
    assert all(float(first) == 0 < float(at) <= 1 for first, at, _ in times)
    return [(e.text, float(at) * WHOLE_S) for e, (_, at, _) in zip(spans, times, strict=True)]


def test_every_token_appears_when_it_came():
    slow, fast = trace("ab", "c"), trace("abc", step_s=0.05)
    found = appearances(replay_svg({"slow": slow, "fast": fast}, TOKENIZER))
    assert [text for text, _ in found] == list("abcabc")
    times = [t for _, t in found]
    scale = LASTS_S / 0.3  # the slower one lasts 0.3 s
    expected = [scale * t for t in (0.1, 0.2, 0.3, 0.05, 0.1, 0.15)]
    assert times == pytest.approx(expected, abs=2e-3)


def test_a_text_of_any_kind_stays_text():
    page = replay_svg({"<b>": trace("<script>x</script>&\n\x00\x1b é")}, TOKENIZER, "a & b")
    assert "<script" not in page and "&lt;b&gt;: " in page and "a &amp; b" in page
    said = "".join(text or "" for text, _ in appearances(page))
    assert said.startswith("<script>x</script>&") and "é" in said


def test_it_is_an_image_with_a_text_for_those_who_do_not_see_it():
    shown = replay({"one": trace("ab")}, TOKENIZER).data
    data = re.fullmatch(r'<img alt="Replay[^"]*one" src="data:image/svg\+xml;base64,(.*)">', shown)
    ElementTree.fromstring(base64.b64decode(data[1]))
    assert "prefers-reduced-motion" in base64.b64decode(data[1]).decode()


def test_the_note_says_where_the_prompts_end():
    page = replay_svg({"one": trace("ab")}, TOKENIZER, "a model")
    assert "prompts end after 4 tokens, so texts may begin in mid-sentence" in page
