"""The kit's own prompts: well-formed, all different, in several languages, short to long."""

import json
from collections import Counter

import pytest

from llmperf.decoding import requests as workload

PATH = workload.DATA / "prompts.jsonl"
# How many of each kind, and the range of their lengths. Lengths are UTF-8 bytes, which need no
# tokenizer: a byte-level BPE makes 0.2 tokens of a byte of English and up to 0.7 of one of Chinese.
KINDS = {
    "short": (20, 30, 100),
    "medium": (18, 90, 400),
    "long": (12, 550, 2500),
    "code": (8, 150, 400),
    "chat": (6, 120, 700),
}
LANGUAGES = {"en", "zh", "de", "fr", "es", "ar", "hi", "ja", "pt", "ru"}
# A letter that shows that the text is in the script of its language.
SCRIPTS = {"zh": "一鿿", "ja": "ぁヿ", "ar": "؀ۿ", "hi": "ऀॿ", "ru": "Ѐӿ"}

ROWS = workload.prompts(PATH)


def size(row: dict) -> int:
    return len(row["text"].encode("utf-8"))


def test_every_line_is_plain_utf8_json_with_the_four_fields():
    lines = PATH.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == len(ROWS) == 64
    for line, row in zip(lines, ROWS, strict=True):
        assert line == json.dumps(row, ensure_ascii=False) + "\n"
        assert list(row) == ["id", "kind", "language", "text"]


def test_ids_are_the_line_numbers():
    assert [row["id"] for row in ROWS] == list(range(64))


def test_texts_are_different_from_their_first_words_on():
    assert len({row["text"][:12].casefold() for row in ROWS}) == 64


def test_texts_hold_no_stray_space_or_control_character():
    for row in ROWS:
        text = row["text"]
        assert text == text.lstrip() and "\r" not in text and "\t" not in text, row["id"]
        assert text == text.rstrip() or row["kind"] == "code", row["id"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_count_and_its_lengths(kind):
    count, least, most = KINDS[kind]
    sizes = {row["id"]: size(row) for row in ROWS if row["kind"] == kind}
    assert len(sizes) == count
    assert {i: n for i, n in sizes.items() if not least <= n <= most} == {}


def test_the_longest_prompt_is_forty_times_the_shortest():
    assert max(map(size, ROWS)) >= 40 * min(map(size, ROWS))


def test_languages_are_the_ten_and_mostly_english():
    counts = Counter(row["language"] for row in ROWS)
    assert set(counts) == LANGUAGES
    assert min(counts.values()) >= 2
    assert counts["en"] > 32


def test_a_language_with_its_own_script_uses_it():
    for row in ROWS:
        for language, (first, last) in SCRIPTS.items():
            has = any(first <= letter <= last for letter in row["text"])
            wanted = language == row["language"] or (language == "zh" and row["language"] == "ja")
            assert has == wanted, (row["id"], language)


def test_the_first_sixteen_mix_kinds_and_languages():
    first = ROWS[:16]
    assert {row["kind"] for row in first} == set(KINDS)
    assert len({row["language"] for row in first}) >= 5
    assert all(a["kind"] != b["kind"] for a, b in zip(first, first[1:], strict=False))
