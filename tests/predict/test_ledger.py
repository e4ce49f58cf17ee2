"""The ledger, the allocator's rules, the published memory figures, and what fits a card."""

import random
from dataclasses import replace

import pytest
from tiny_models import CONFIGS

from llmperf import REFERENCE, predict
from llmperf.findings import published
from llmperf.models import shape_of
from llmperf.predict import RunSpec
from llmperf.predict.allocator import MIB, place, rounded

GIB = predict.GIB
GPT2, YI_34B = shape_of("gpt2"), shape_of("yi-34b-chat-4bits")


def tiny(case):
    family, fields = CONFIGS[case]
    return shape_of({"model_type": family, **fields})


# The allocator


def test_placing_by_hand():
    assert rounded(0) == rounded(1) == 512
    assert rounded(513) == 1024
    # 1 MiB + 1: from a segment of 20 MiB, the rest of almost 19 split off and used by 18 MiB; the
    # rest of that is below 1 MiB and stays with it.
    placed = place([MIB + 1, 18 * MIB])
    assert placed.reserved == 20 * MIB
    assert placed.allocated == 20 * MIB
    assert placed.requested == 19 * MIB + 1
    # From 10 MiB on a segment of its own, rounded to 2 MiB; a rest of just 1 MiB is not split off.
    assert (place([11 * MIB]).allocated, place([11 * MIB]).reserved) == (12 * MIB, 12 * MIB)
    # Small ones share 2 MiB, and the smallest block that holds a request is taken.
    assert place([MIB, MIB // 2, MIB // 2, 512]).reserved == 4 * MIB


def test_placing_never_loses_a_byte():
    source = random.Random(3)
    for _ in range(50):
        sizes = [int(10 ** source.uniform(1, 8)) for _ in range(200)]
        placed = place(sizes)
        assert placed.requested == sum(sizes)
        assert placed.requested <= sum(map(rounded, sizes)) <= placed.allocated <= placed.reserved


# The publication


def test_every_published_allocated_figure(capsys):
    """Weights + buffers of transformers 4 + cuBLAS workspaces, as the allocator places them.

    GPT-2: 497,759,232 bytes in fp32, 12 masks of 1024 x 1024, one workspace of 8.125 MiB: 0.4832
    GiB asked for, 0.4846 in blocks. Each thread has one workspace more.
    """
    rows = published.allocated().to_dict("records")
    for r in rows:
        print(
            f"line {r['line']:3} {r['model']:18} {r['strategy']:10} {r['concurrency']:>2} "
            f"{r['row']:6} measured {r['allocated_gb']} predicted {r['predicted_gb']:.4f} "
            f"error {r['error_gb']:+.4f}"
        )
    assert max(abs(r["error_gb"]) for r in rows) < 0.0036, capsys.readouterr().out
    lasts = {(r["platform"], r["experiment"], r["model"], r["concurrency"]) for r in rows
             if r["strategy"] == "threads"}  # fmt: skip
    assert len(lasts) == 3 + 3 + 3 + 2 + 2  # every group of threads is there
    assert len(rows) == 164 - 2 * 13 - 13 - 2 * 3  # without the lines of threads not yet last
    by_hand = (497_759_232 + 12 * (1024**2 + 4) + 8_519_680) / GIB
    placed = predict.at_rest(GPT2, "fp32", masks=True)
    assert placed.requested / GIB == by_hand
    assert by_hand == pytest.approx(0.4832, abs=5e-5)


def test_threads_without_reuse_are_told_from_threads_with():
    """Lines 140 and 162: three threads after two. Three workspaces would miss by 0.016."""
    rows = {r["line"]: r for r in published.allocated().to_dict("records")}
    assert (rows[86]["handles"], rows[140]["handles"]) == (11, 6)
    reused = predict.at_rest(GPT2, "fp32", handles=4, masks=True).allocated / GIB
    assert float(rows[140]["allocated_gb"]) - reused == pytest.approx(0.0156, abs=5e-4)


def test_published_reserved_lies_between_the_bounds():
    """All lines of batches and single requests; threads of GPT-2 (those of 34B came after a batch
    of ten, and what that had reserved was still there)."""
    checked = 0
    for r in published.audited().to_dict("records"):
        threads = int(r["concurrency"]) if r["strategy"] == "threads" else 0
        if r["strategy"] not in ("batch", "sequential", "threads"):
            continue
        if threads > 1 and (r["model"] != "GPT2" or r["row"] != "total"):
            continue
        if r["strategy"] == "threads" and r["model"] != "GPT2":
            continue
        shape, dtype = _published(r["model"])
        rows = int(r["batch_size"]) if r["strategy"] == "batch" else 1
        spec = RunSpec(
            shape, dtype, rows=rows, prompt_tokens=16, new_tokens=256, threads=threads,
            platform="wsl2", loop="recompute", masks=True,
        )  # fmt: skip
        bounds = predict.memory(spec).at("reserved")
        assert bounds[0] <= float(r["reserved_gb"]) * GIB <= bounds[1], r["line"]
        checked += 1
    assert checked > 60


def _published(name):
    known, dtype = {
        "GPT2": ("gpt2", "fp32"),
        "Yi-6B-Chat": ("yi-6b-chat", "fp16"),
        "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16"),
    }[name]
    return shape_of(known), dtype


def test_yi_deployment_implies_lengths_within_the_models_positions():
    rows = published.yi_deployment().to_dict("records")
    assert len(rows) == 24
    for r in rows:
        assert r["tokens_low"] <= r["tokens"] <= r["tokens_high"]
        if r["batch_size"] >= 16 and r["bound"] == "=":  # where the cache outweighs the rounding
            assert 2900 < r["tokens"] < 4100, r
            assert r["predicted_gb"] == pytest.approx(float(r["vram_gb"]), abs=1.1), r
    cell = next(r for r in rows if r["model"] == "Yi-34B-Chat-4bits" and r["batch_size"] == 32)
    # 40 GiB less 17.9 of weights, over 32 rows x 2 x 60 layers x 8 heads x 128 x 2 bytes
    assert cell["per_token_bytes"] == 32 * 245_760
    assert cell["tokens"] == round((40 - cell["rest_gb"]) * GIB / (32 * 245_760)) == 3012


# The ledger


def test_lines_add_up_and_levels_nest():
    for threads, processes in ((0, 1), (4, 1), (0, 3)):
        for platform in predict.PLATFORMS:
            how = {"threads": threads, "processes": processes, "platform": platform}
            book = predict.memory(RunSpec(GPT2, "fp32", rows=2, **how))
            levels = [book.at(level) for level in predict.LEVELS]
            assert levels == sorted(levels)
            assert all(0 <= line.low <= line.high for line in book.lines)
            assert levels[-1] == (book.low, book.high)


def test_what_grows_with_what():
    def line(name, **run):
        return predict.memory(RunSpec(GPT2, "fp32", rows=2, **run)).line(name)

    assert line("weights").low == 4 * GPT2.parameters()
    assert line("weights", threads=3).low == 4 * GPT2.parameters()
    assert line("weights", processes=3).low == 12 * GPT2.parameters()
    one = line("kv cache", prompt_tokens=30, new_tokens=11)
    # the last token is not fed back: 40 entries
    assert one.low == one.high == predict.kv_bytes(GPT2, 2, 40, "fp32")
    for workers in ("threads", "processes"):
        many = line("kv cache", prompt_tokens=30, new_tokens=11, **{workers: 3})
        assert many.low == 3 * one.low
    assert line("kv cache", loop="recompute").low == 0
    assert line("kv cache", loop="compiled", prompt_tokens=30, new_tokens=11).low > one.low
    graph = line("kv cache", loop="compiled", prompt_tokens=200, new_tokens=72)
    assert graph.low == predict.kv_bytes(GPT2, 2, 272, "fp32")
    assert graph.high == predict.kv_bytes(GPT2, 2, 512, "fp32"), "its buffers are rounded up"
    assert line("workspaces").low == 8_519_680
    assert line("workspaces").high == 32 * MIB
    assert line("workspaces", threads=10).low == 11 * 8_519_680
    assert line("workspaces", processes=3).low == 3 * 8_519_680
    own = line("workspaces", threads=10, streams=10)
    assert (own.low, own.high) == (11 * 8_519_680, (1 + 10 * 10) * 32 * MIB)
    assert line("workspaces", threads=10).high == 11 * 32 * MIB
    positions = line("logits", loop="recompute", prompt_tokens=50, new_tokens=40)
    assert positions.low == 2 * 89 * GPT2.vocab * 4
    assert line("logits", prompt_tokens=50, new_tokens=40).low == 2 * GPT2.vocab * 4


def test_a_large_cache_later_covers_what_the_prefill_needs_now():
    """What a prefill of 400 tokens needs is less than what 299 more tokens of cache take."""
    spec = RunSpec(GPT2, "fp32", rows=2, prompt_tokens=400)
    short, long = (predict.memory(replace(spec, new_tokens=n)) for n in (1, 300))
    growth = long.line("kv cache").low - short.line("kv cache").low
    wide = 2 * 400 * (2 * 768 + 2 * 3072) * 4  # residual, normed copy, two intermediates, fp32
    assert short.line("activations").low == wide - short.line("logits").low
    assert growth > wide  # so only the last step remains: one layer's keys twice, and its rows
    last = 2 * 699 * 768 * 4 + 2 * (2 * 768 + 2 * 3072) * 4
    assert long.line("activations").low == last - long.line("logits").low


def test_a_sliding_prompt_is_held_whole_until_the_first_step():
    """Window 8, prompt 50: right after the prefill each layer still holds 50 tokens."""
    full, sliding = tiny("llama"), tiny("mistral")
    a, b = (
        predict.memory(RunSpec(s, "fp32", prompt_tokens=50, new_tokens=10)) for s in (full, sliding)
    )
    index = 4 * 8  # each of four sliding layers holds its window as one int64
    assert b.line("kv cache").low == 8 * a.line("kv cache").low // 59 + index
    at_prefill = predict.kv_bytes(full, 1, 50, "fp32")
    assert b.line("activations").low > at_prefill - b.line("kv cache").low - b.line("logits").low


def test_measured_overhead_and_idle_use_take_the_place_of_ranges():
    measured = {"first": {"total": 500}, "further": {"total": 300}}
    spec = RunSpec(GPT2, processes=3, platform="windows")
    book = predict.memory(spec, overhead=measured, idle_bytes=77)
    context, idle = book.line("context and libraries"), book.line("in use before the start")
    assert (context.low, context.high) == (1100, 1100)
    assert (idle.low, idle.high) == (77, 77)
    assert not book.warnings
    beside = predict.memory(spec, overhead=measured, beside_another=True).line(
        "context and libraries"
    )
    assert beside.low == 900, "another process holds what all share"


def test_published_device_use_lies_between_the_bounds():
    """1 to 4 processes of GPT-2, 0.3 GiB in use before; figures rounded to 0.1."""
    import csv

    with (REFERENCE / "process_vram.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if int(r["processes"])]
    assert len(rows) == 8
    for r in rows:
        spec = RunSpec(
            GPT2, "fp32", prompt_tokens=16, new_tokens=256, processes=int(r["processes"]),
            platform=r["platform"].lower(), loop="recompute", masks=True,
        )  # fmt: skip
        book = predict.memory(spec, idle_bytes=int(0.3 * GIB))
        assert book.low - 0.05 * GIB <= float(r["device_used_gb"]) * GIB <= book.high + 0.05 * GIB


def test_warnings_and_bad_input():
    long = RunSpec(GPT2, prompt_tokens=1000, new_tokens=100)
    assert "beyond the 1024 positions of gpt2" in predict.memory(long).warnings[0]
    assert not predict.memory(RunSpec(GPT2, prompt_tokens=2000, loop="recompute")).warnings
    for wrong, says in (
        ({"platform": "amiga"}, "unknown platform"),
        ({"loop": "x"}, "unknown loop"),
        ({"rows": 0}, "rows is 0.*at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"dtype": "fp8"}, "unknown dtype"),
    ):
        with pytest.raises(ValueError, match=says):
            RunSpec(GPT2, **wrong)


# What fits


RUN = RunSpec(YI_34B, "fp16", rows=4, prompt_tokens=1536, new_tokens=512)


def test_yi_34b_on_an_rtx_3090():
    said = predict.advise(RUN, predict.card("RTX 3090"))
    assert "weights 17.91 + kv cache 1.87" in said[0]
    assert "might fit in 24.00 GiB" in said[0]
    assert any(s.startswith("Batch 3 surely fits") for s in said)
    assert said[-1] == "RTX 5090 (32 GiB) surely holds it."
    whole = replace(RUN, shape=shape_of("yi-34b-chat"))
    plain = predict.advise(whole, predict.card("RTX 3090"))
    assert "does not fit" in plain[0]
    assert any(s.startswith("With awq weights") and "might fit" in s for s in plain)


def test_the_largest_fits_and_one_more_does_not():
    size = 24 * GIB
    short = replace(RUN, prompt_tokens=512)
    many = replace(short, shape=GPT2)
    for key, spec in (("rows", short), ("processes", many)):
        found = predict.largest(spec, key, size)
        assert 0 < found.surely < found.at_best
        for n, bound in ((found.surely, "high"), (found.at_best, "low")):
            assert getattr(predict.memory(replace(spec, **{key: n})), bound) <= size
            assert getattr(predict.memory(replace(spec, **{key: n + 1})), bound) > size
    prompt = predict.largest(RUN, "prompt_tokens", size)
    assert 0 < prompt.surely < prompt.at_best < YI_34B.max_positions
    whole = replace(RUN, shape=shape_of("yi-34b-chat"))
    assert predict.largest(whole, "rows", size).at_best == 0


def test_judged_beforehand_with_the_arithmetic():
    book = predict.memory(RunSpec(shape_of("yi-6b-chat")))
    refused = predict.judge(book, 8 * GIB)
    assert refused.verdict == "does not fit"
    assert "weights 11.29" in refused.sentence and "in 8.00 GiB" in refused.sentence
    assert predict.judge(book, 24 * GIB).verdict == "fits"
    assert predict.judge(book, book.low).verdict == "might fit"


def test_the_budget_keeps_a_margin_where_a_full_card_spills():
    assert predict.budget("linux", 20 * GIB, 24 * GIB) == 20 * GIB
    assert predict.budget("wsl2", 20 * GIB, 24 * GIB) == int(18.8 * GIB)
    assert predict.budget("windows", 3 * GIB, 4 * GIB) == int(2.5 * GIB)
    with pytest.raises(ValueError, match="leaves nothing"):
        predict.budget("windows", GIB // 4, 4 * GIB)


def test_a_knee_is_a_fall_and_not_a_plateau():
    levels, memory_bytes = [1, 2, 4, 8, 16], [n * GIB for n in (3, 4, 6, 10, 18)]
    found = predict.knee(levels, [90, 170, 300, 310, 40], memory_bytes)
    assert (
        "from level 8 to 16 memory grows by 8.00 GiB and throughput falls from 310 to 40" in found
    )
    assert predict.knee(levels, [90, 170, 300, 310, 300], memory_bytes) is None
    assert predict.knee(levels, [90, 170, 300, 310, 40], [GIB] * 5) is None
    with pytest.raises(ValueError, match="shorter"):
        predict.knee(levels, [1], memory_bytes)
