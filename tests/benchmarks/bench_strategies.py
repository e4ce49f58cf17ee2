"""What the strategies themselves cost, and what they win: `python bench_strategies.py [quick]`.

Rounds are interleaved: each has every arm once, in shuffled order, and arms are compared within a
round. `quick` takes a small random model and few rounds, to see that it runs.
"""

import argparse
import tempfile
import time

from llmperf import models, stats, strategies
from llmperf.decoding import generate
from llmperf.decoding import requests as workload
from llmperf.measure import paired
from llmperf.strategies import STRATEGIES


def ratio_of(speeds: dict, one: str, other: str) -> str:
    """Throughput of one arm over another's, with its 95 % interval over the paired rounds."""
    found = stats.ratio_interval(speeds[one], speeds[other], paired=True)
    if found.low is None:
        return f"{found.value:.3f} (too few rounds for an interval)"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def arm(model, name: str, n: int, new_tokens: int, **options):
    """One arm: a run of strategy `name` with `n` requests."""
    work = workload.build(model.tokenizer, n, 16, new_tokens)
    return lambda: STRATEGIES[name](model, work, options)


def coroutine_against_sequential(model, rounds: int, n: int = 4) -> None:
    arms = {name: arm(model, name, n, 16) for name in ("sequential", "coroutine")}
    speeds = paired(arms, rounds)
    print(f"coroutine over sequential, {n} tasks: {ratio_of(speeds, 'coroutine', 'sequential')}")
    print("  wanted: within 3 % of 1")


def batch_against_workers(model, rounds: int, n: int = 8) -> None:
    arms = {"batch": arm(model, "batch", n, 16)}
    arms |= {f"threads {i}": arm(model, "threads", n, 16, intra_op=i) for i in (1, 2)}
    arms["2 threads"] = arm(model, "threads", n, 16, intra_op=1, workers=2)
    arms["2 processes"] = arm(model, "processes", n, 16, workers=2)
    if rounds > 3:
        arms["processes"] = arm(model, "processes", n, 16)
    with strategies.session():
        speeds = paired(arms, rounds)
    medians = {name: stats.median_interval(values).value for name, values in speeds.items()}
    best = max((name for name in medians if name != "batch"), key=medians.get)
    print(
        f"tokens/s at {n} requests, {model.label()}:", {k: round(v, 1) for k, v in medians.items()}
    )
    print(f"batch over the best of them ({best}): {ratio_of(speeds, 'batch', best)}")
    print("  wanted: at least 1.5 in bf16 on two cores")


def overhead(model, rounds: int, requests: int = 50, new_tokens: int = 50) -> None:
    """With a loop that costs nothing: microseconds a request, and a token, of each strategy."""
    real, generate.decode = generate.decode, _costless
    try:
        for name, options in (
            ("sequential", {}),
            ("coroutine", {}),
            ("coroutine", {"variant": "yielding"}),
            ("coroutine", {"variant": "to_thread"}),
            ("coroutine", {"variant": "to_thread", "workers": 1}),
            ("threads", {"workers": 1, "intra_op": 1}),
        ):
            short = _seconds(model, name, options, requests, 1, rounds)
            long = _seconds(model, name, options, requests, new_tokens, rounds)
            token = (long - short) / (requests * (new_tokens - 1)) * 1e6
            request = short / requests * 1e6
            print(f"{name} {options}: {request:.0f} us a request, {token:.1f} us a token")
    finally:
        generate.decode = real
    print("  wanted: under 100 us a request more than sequential, and 20 us a token")


def _costless(model, requests, **how):
    for step in range(max(r.max_new_tokens for r in requests)):
        yield [0 if step < r.max_new_tokens else None for r in requests]


def _seconds(model, name, options, requests, new_tokens, rounds) -> float:
    work = workload.build(model.tokenizer, requests, 4, new_tokens)
    return min(STRATEGIES[name](model, work, options).duration_s for _ in range(rounds))


def crowds(model) -> None:
    """A hundred threads and a thousand coroutines end."""
    for name, n, options in (("threads", 100, {"intra_op": 1}), ("coroutine", 1000, {})):
        start = time.perf_counter()
        STRATEGIES[name](model, workload.build(model.tokenizer, n, 4, 2), options)
        print(f"{n} {name}: {time.perf_counter() - start:.2f} s")


def small_model() -> models.Model:
    """A random two-layer Llama with a byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    folder = tempfile.mkdtemp(prefix="bench-")
    LlamaForCausalLM(config).save_pretrained(folder)
    models.byte_tokenizer().save_pretrained(folder)
    return models.load(folder, dtype="fp32", device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", choices=("quick", "full"), default="full")
    quick = parser.parse_args().size == "quick"
    rounds, small = (3, small_model()) if quick else (9, small_model())
    overhead(small, rounds)
    crowds(small)
    coroutine_against_sequential(small if quick else models.load(models.EMBEDDED, "fp32"), rounds)
    batch_against_workers(small if quick else models.load(models.EMBEDDED, "bf16"), rounds)


if __name__ == "__main__":
    main()
