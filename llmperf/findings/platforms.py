"""Findings on Windows and WSL2: pairs of settings with the same card and all else equal."""

from __future__ import annotations

from collections.abc import Iterator

from llmperf.findings.evidence import FAILS, HOLDS, Evidence, Figure, Setting, ratio
from llmperf.findings.parts import ALIKE, Part, both, check, only, part, top_level


def pairs(evidence: Evidence) -> Iterator[tuple[Setting, Setting]]:
    """WSL2 and Windows with all else equal: the same card, model, lengths and loop."""
    windows = {_without_os(s): s for s in evidence.settings if s.os == "Windows"}
    for s in evidence.settings:
        if s.os == "WSL2" and (other := windows.get(_without_os(s))):
            yield s, other


def _without_os(s: Setting) -> str:
    return s.key.replace(f'["{s.os}"', '["', 1)


BOTH = "run the study on Windows and on WSL2 of one machine (notebook 10 says how)"


@check("threads-wsl2", BOTH)
def threads_wsl2(evidence: Evidence) -> Iterator[Part]:
    """A quarter of the speed and slower than in a row; half of the speed is the limit here."""
    found = list(pairs(evidence))
    levels = [top_level(a.levels("threads") & b.levels("threads")) for a, b in found]
    for (wsl, windows), n in zip(found, levels, strict=True):
        if n is None or n < max(filter(None, levels)):
            continue
        threads = wsl.seconds("threads", n)
        against = ratio(threads, windows.seconds("threads", n))
        row, how = wsl.in_a_row(n)
        beside = f"{n} threads take {{}} times as long on WSL2 as on Windows"
        alone = f"on WSL2 they take {{}} times as long as {how}"
        yield from both(
            only(part(wsl, against, beside, least=2)),
            only(part(wsl, ratio(threads, row), alone, least=1)),
            wsl,
        )


@check("wsl2-single-faster", BOTH)
def wsl2_single(evidence: Evidence) -> Iterator[Part]:
    for wsl, windows in pairs(evidence):
        sides = [s.seconds("sequential", 1) or s.seconds("batch", 1) for s in (wsl, windows)]
        ten = [s.seconds("batch", 10) for s in (wsl, windows)]
        text = "one request takes {} times as long on WSL2 as on Windows"
        one = only(part(wsl, ratio(*sides), text, most=1))
        alike = part(wsl, ratio(*ten), "batch 10 takes {} times", 1 - ALIKE, 1 + ALIKE)
        yield from both(one, only(alike), wsl) if one else ()


@check("vram-same-inside", BOTH + ", notebook 06")
def vram_same(evidence: Evidence) -> Iterator[Part]:
    for wsl, windows in pairs(evidence):
        inside = _level(wsl, "reserved"), _level(windows, "reserved")
        device = _level(wsl, "device_used"), _level(windows, "device_used")
        if None in inside or None in device:
            continue
        a, b = inside[0] / inside[1], device[0] / device[1]
        verdict = HOLDS if abs(a - 1) <= 0.05 and abs(b - 1) > ALIKE else FAILS
        text = f"inside the process {a:.2f} times Windows, at device level {b:.2f} times"
        yield Part(wsl, verdict, verdict, text, Figure(a))


def _level(s: Setting, channel: str) -> float | None:
    """Bytes of one process at level 1, from whichever strategy has them."""
    for strategy in ("processes", "sequential", "batch"):
        if peaks := s.peaks(channel, strategy, 1):
            return max(peaks)
    return None
