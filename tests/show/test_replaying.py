"""The replay: an animated SVG in which each token appears when it came."""

import base64
import re
from xml.etree import ElementTree

import pytest

from llmperf import models
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import Record
from llmperf.show import replay, replay_svg, side_by_side
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


def run_of(strategy, level, step_s, options=None, **condition):
    """A record of `level` requests, one after another with `step_s` between tokens."""
    took = trace(*["ab"] * level, step_s=step_s)
    condition = {"strategy": strategy, "level": level, "options": options or {}, "loop": "cached",
                 "model": "made-up", "dtype": "fp32", "weights": "random", "device": "cpu",
                 "prompt_tokens": 4, "new_tokens": 2} | condition  # fmt: skip
    numbers = {"duration_s": took.duration_s, "output_tokens_per_s": 1.0}
    return Record("03-batch", condition, 0, trace=took.to_dict(), metrics=numbers)


def titles(shown):
    """The panels' titles: the option, and how long its median run took."""
    data = re.search('base64,([^"]*)', shown.data)[1]
    root = ElementTree.fromstring(base64.b64decode(data))
    return [e.text for e in root.iter() if e.get("font-weight") == "bold"]


def test_the_slowest_and_the_fastest_option_are_replayed():
    records = [run_of("batch", 4, s) for s in (0.01, 0.02, 0.3)]
    records += [run_of("threads", 4, 0.1, {"intra_op": n}) for n in (1, 2)]
    records += [run_of("threads", 4, 0.2, {"intra_op": 2}) for _ in range(2)]
    records += [run_of("sequential", 1, 9.0), run_of("batch", 1, 0.1)]  # at a lower level
    records += [run_of("batch", 8, 9.0), run_of("coroutine", 4, 9.0, new_tokens=3)]  # alone
    records += [run_of("peer", 4, 9.0, {"engine": "generate"})]  # foreign
    assert titles(side_by_side.replay_ends(records)) == [
        "4 threads (intra_op 2): 8 tokens in 1.60 s",
        "batches of 4: 8 tokens in 0.16 s",
    ]


@pytest.mark.parametrize(
    "fault", ["shared", "alone", "damaged", "arriving", "model", "no times", "nothing"]
)
def test_what_cannot_be_replayed_is_said(fault, tmp_path):
    records = [run_of("batch", 2, 0.1), run_of("threads", 2, 0.2)]
    for r in records if fault not in ("alone", "nothing") else ():
        if fault == "shared":
            r.trace["requests"] = []
        elif fault == "arriving":
            r.condition["arrivals"] = {"kind": "even", "rate_per_s": 1.0}
        elif fault == "no times":
            del r.metrics["duration_s"], r.condition["model"]
        elif fault == "damaged":
            del r.trace["requests"][0]["tokens"]
        else:
            r.condition.update(weights="trained", model=str(tmp_path / "gone"))
    words = {"shared": "no token times", "arriving": "no two options", "alone": "no two options",
             "no times": "no two options", "nothing": "no two options",
             "damaged": "are damaged", "model": "tokenizer of gone cannot be loaded"}  # fmt: skip
    with pytest.raises(ValueError, match=words[fault]):
        side_by_side.replay_ends(records[: {"alone": 1, "nothing": 0}.get(fault)])
