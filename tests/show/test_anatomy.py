"""One generation in phases: the loop's own tokens, and nothing left out of the time."""

import time

from llmperf import decoding
from llmperf.decoding import GREEDY, Request
from llmperf.show import anatomy


def test_the_phases_hold_the_whole_time_of_the_cached_loop(tiny, monkeypatch):
    drawn, draw = [], anatomy.next_tokens
    monkeypatch.setattr(anatomy, "next_tokens", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    start = time.perf_counter()
    watch = anatomy.split(tiny, "All cats are grey", 9, GREEDY)
    took_ms = (time.perf_counter() - start) * 1e3
    ids = tiny.tokenizer("All cats are grey", add_special_tokens=False)["input_ids"]
    expected = decoding.decode(tiny, [Request(0, tuple(ids), 9)], loop="cached", sampling=GREEDY)
    assert [t.item() for t in drawn] == [row[0] for row in expected]
    assert all(watch.processor_ms[phase] > 0 for phase in anatomy.PHASES)
    assert 0.5 * took_ms < sum(watch.processor_ms.values()) < took_ms
    assert not any(watch.waiting_ms.values())
