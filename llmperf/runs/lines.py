"""One line of a records file → a record as a dict, reading no more of it than is needed.

Most of a line is token times; its environment and condition stand on many lines alike. So the line
is cut at the names of its fields, which `records.Store` writes in one order: what repeats is parsed
once, token times never, and memory and notes when somebody asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain

CUTS = ("condition", "repeat", "environment", "trace", "token_digest", "metrics", "memory",
        "prediction", "agreement")  # fmt: skip
MARKS = tuple(f', "{name}": '.encode() for name in CUTS)
GLUE = (b"", MARKS[1], MARKS[5], MARKS[7], MARKS[8])
REQUESTS, NOTES, REASONS = b'"requests": [', b'], "notes": ', b', "reasons": '


class Block(Mapping):
    """A JSON object that is parsed when it is first looked into."""

    __slots__ = ("_parsed", "_raw")

    def __init__(self, raw: bytes):
        self._raw, self._parsed = raw, None

    def _all(self) -> dict:
        if self._parsed is None:
            self._parsed, self._raw = json.loads(self._raw.decode()) or {}, b""
        return self._parsed

    def __getitem__(self, key):
        return self._all()[key]

    def __iter__(self) -> Iterator:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def parse(line: bytes, seen: dict[bytes, dict]) -> dict:
    """The record of a line without its token times; `seen` keeps what repeats, for one file.

    Raises ValueError for what is no JSON.
    """
    parts = _cut(line)
    if parts is not None:
        try:
            return _assemble(parts, seen)
        except ValueError:
            pass  # a field's name stood inside another field: read the line the plain way
    record = json.loads(line.decode(errors="replace"))
    if isinstance(record, dict) and isinstance(record.get("trace"), dict):
        record["trace"] = {**record["trace"], "requests": []}
    return record


def _cut(line: bytes) -> list[bytes] | None:
    """The line's pieces between the marks, or None when it was written otherwise."""
    line = line.rstrip()
    at, pieces = 0, []
    for mark in MARKS:
        found = line.find(mark, at)
        if found < 0:
            return None
        pieces.append(line[at:found])
        at = found + len(mark)
    return [*pieces, line[at:]]


def _assemble(parts: list[bytes], seen: dict[bytes, dict]) -> dict:
    head, condition, middle, environment, trace, _, metrics, memory, prediction, tail = parts
    reasons = metrics.rfind(REASONS)  # why a metric is None: the None itself says enough here
    metrics = metrics[:reasons] + b"}" if reasons > 0 else metrics
    pieces = (head, middle, metrics, prediction, tail)
    record = json.loads(b"".join(chain(*zip(GLUE, pieces, strict=True))).decode())
    record["condition"] = _once(condition, seen)
    record["environment"] = _once(environment, seen)
    record["trace"] = _trace(trace)
    record["memory"] = _block(memory)
    return record


def _once(raw: bytes, seen: dict[bytes, dict]) -> dict:
    if raw not in seen:
        seen[raw] = json.loads(raw.decode())
    return seen[raw]


def _trace(raw: bytes) -> dict | None:
    """The notes."""
    if raw == b"null":
        return None
    begin, end = raw.find(REQUESTS), raw.rfind(NOTES)
    if not 0 <= begin < end:
        raise ValueError("a trace of another form")
    return {"requests": [], "notes": _block(raw[end + len(NOTES) : -1])}


def _block(raw: bytes) -> Mapping:
    """Unparsed, once it is sure that it is one whole object."""
    whole = raw[:1] == b"{" and raw[-1:] == b"}" and raw.count(b"{") == raw.count(b"}")
    if not whole:
        raise ValueError("not one whole object")
    return Block(raw) if len(raw) > 2 else {}
