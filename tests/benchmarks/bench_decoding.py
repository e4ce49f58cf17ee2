"""The loops beside their peers, interleaved in one process: tokens/s, MBU, ratio to `generate`.

    python tests/benchmarks/bench_decoding.py [--dtypes fp32 bf16] [--rows 1 8] [--new 128]

llama.cpp takes part at batch 1 when `llama-cpp-python` is installed. Keep the machine idle. The
bandwidth of a shared one varies: it is measured in every round, and MBU is each round's own.
"""

import argparse
import statistics
import time

import torch

from llmperf import decoding, models, stats
from llmperf.decoding import requests as workload
from llmperf.decoding import sampling
from llmperf.decoding import static_cache as compiled
from llmperf.machine import ceilings
from llmperf.strategies import llamacpp

PROMPT = 32  # tokens


def generate(model, asked, cache=None):
    new = asked[0].max_new_tokens
    ids = torch.tensor([r.prompt_ids for r in asked], device=model.torch_device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    if cache:
        options["cache_implementation"] = cache
    out = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[:, PROMPT:].T.tolist()


def runs(model, asked):
    """Name → a call that returns one list of tokens a step."""
    greedy = sampling.GREEDY

    def loop(name):
        return lambda: list(decoding.decode(model, asked, loop=name, sampling=greedy))

    found = {
        "generate": lambda: generate(model, asked),
        "generate, static cache": lambda: generate(model, asked, "static"),
        "cached": loop("cached"),
        "compiled": loop("compiled"),
    }
    if len(asked) == 1 and not llamacpp.unavailable(model):
        found["llama.cpp"] = llama_cpp(str(llamacpp.gguf(model.dtype)), asked[0])
    return found


def llama_cpp(gguf, request):
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    peer = Llama(gguf, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run():
        peer.reset()
        steps = peer.generate(list(request.prompt_ids), temp=0.0, repeat_penalty=1.0)
        return [[next(steps)] for _ in range(request.max_new_tokens)]

    return run


def measure(found, repeats, device):
    """Seconds of each run, one list a name, and bytes/s read; a round has all of them once."""
    seconds, bandwidths = {name: [] for name in found}, []
    for _ in range(repeats):
        bandwidths.append(ceilings.read_bandwidth(device, repeats=3)["median"])
        for name, run in found.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, bandwidths


def interval(one, other):
    """Ratio of two lists of seconds, as speeds, with its 95 % interval over the rounds."""
    ratio = stats.ratio_interval(other, one, paired=True)
    span = "too few" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.value:8.2f} {span:>13}"


def table(model, rows, new, repeats):
    asked = workload.build(model.tokenizer, rows, PROMPT, new).requests
    plan = compiled.prepare(model, rows, PROMPT + new, sampling.GREEDY)
    found = runs(model, asked)
    tokens = {name: run() for name, run in found.items()}  # warm-up
    seconds, bandwidths = measure(found, repeats, model.device)
    weights = sum(p.nbytes for p in model.module.parameters())
    read = f"{min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s read"
    print(f"\n{model.label()}, batch {rows}, {PROMPT} + {new} tokens, {model.device},", end=" ")
    print(f"{torch.get_num_threads()} threads, {read},", end=" ")
    print(f"compiled in {plan.compile_s:.1f} s{'; ' + plan.reason if plan.reason else ''}")
    peer = "llama.cpp" if "llama.cpp" in seconds else "compiled"
    print(f"{'':22} {'tokens/s':>8} {'MBU':>5} {'x generate':>22} {f'x {peer}':>22} {'same':>5}")
    for name, times in seconds.items():
        pairs = list(zip(sum(tokens[name], []), sum(tokens["cached"], []), strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        rounds = zip(times, bandwidths, strict=True)
        mbu = statistics.median(weights * new / second / b for second, b in rounds)
        print(f"{name:22} {rows * new / statistics.median(times):8.1f} {mbu:5.2f}", end=" ")
        ratios = interval(times, seconds["generate"]), interval(times, seconds[peer])
        print(f"{ratios[0]} {ratios[1]} {same:5.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="tokens a request")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for dtype in options.dtypes:
        model = models.load(options.model, dtype=dtype)
        for rows in options.rows:
            table(model, rows, options.new, options.repeats)


if __name__ == "__main__":
    main()
