"""The loops and their peers, interleaved in one process: tokens/s, MBU, ratios with intervals.

    python tests/benchmarks/bench_decoding.py [--dtypes fp32 bf16 int8 int4] [--rows 1 8] [--new 64]

llama.cpp takes part at batch 1 when `llama-cpp-python` is installed. Keep the machine idle. The
bandwidth of a shared one varies: it is measured in every round, and MBU is each round's own.
Last come the ratios that the compiled loop is judged by.
"""

import argparse
import statistics
import time

import torch

from llmperf import decoding, models, stats
from llmperf.decoding import GREEDY
from llmperf.machine import rates
from llmperf.strategies import llamacpp

PROMPT = 32  # tokens
QUANTISED = ("int8", "int4")


def generate(model, asked):
    new = asked[0].max_new_tokens
    ids = torch.tensor([r.prompt_ids for r in asked], device=model.torch_device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    out = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[:, PROMPT:].T.tolist()


def runs(word, model, rows, new):
    """Name → a call that returns one list of tokens a step."""
    asked = decoding.build(model.tokenizer, rows, PROMPT, new).requests

    def loop(name):
        return lambda: list(decoding.decode(model, asked, loop=name, sampling=GREEDY))

    found = {f"{word} x{rows} compiled": loop("compiled")}
    if word not in QUANTISED:
        found[f"{word} x{rows} generate"] = lambda: generate(model, asked)
        found[f"{word} x{rows} cached"] = loop("cached")
    if rows == 1 and not llamacpp.unavailable(model):
        found[f"{word} x{rows} llama.cpp"] = llama_cpp(str(llamacpp.gguf(model.dtype)), asked[0])
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
        bandwidths.append(rates.read_bandwidth(device, repeats=3)["median"])
        for name, run in found.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, bandwidths


def interval(slow, fast, scale=1.0):
    """How many times as fast, by pairs of one round, with its 95 % interval."""
    ratio = stats.ratio_interval([s * scale for s in slow], fast, paired=True)
    if ratio.low is None:
        return f"{ratio.value:.2f} (too few rounds for an interval)"
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def verdicts(seconds, options):
    """The ratios that the compiled loop is judged by."""
    first, most = options.rows[0], options.rows[-1]
    for word in options.dtypes:
        one, many = (seconds.get(f"{word} x{n} compiled") for n in (first, most))
        for peer in ("llama.cpp", "generate"):
            for rows, times in ((first, one), (most, many)):
                if other := seconds.get(f"{word} x{rows} {peer}"):
                    print(f"{word} batch {rows}, compiled over {peer}: {interval(other, times)}")
        if most > first:
            ratio = interval(one, many, most / first)
            print(f"{word} batch {most} over batch {first}, compiled: {ratio}")
        if word in QUANTISED and (whole := seconds.get(f"bf16 x{first} compiled")):
            print(f"{word} over bf16, batch {first}, compiled: {interval(whole, one)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=64, help="tokens a request")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    found, weights = {}, {}
    for word in options.dtypes:
        how = {"dtype": "bf16", "quantization": word} if word in QUANTISED else {"dtype": word}
        model = models.load(options.model, **how)
        ready = decoding.prepare(model)
        print(f"{model.label()}: {ready.loop}, ready in {ready.seconds:.1f} s {ready.reason or ''}")
        size = sum(p.nbytes for p in model.module.parameters())
        for rows in options.rows:
            added = runs(word, model, rows, options.new)
            found |= added
            weights |= dict.fromkeys(added, (size, rows))
    for run in found.values():
        run()  # warm-up
    seconds, bandwidths = measure(found, options.repeats, model.device)
    read = f"{min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s read"
    print(f"{PROMPT} + {options.new} tokens, {torch.get_num_threads()} threads, {read}")
    print(f"{'':24} {'tokens/s':>8} {'MBU':>5}")
    for name, times in seconds.items():
        size, rows = weights[name]
        rounds = zip(times, bandwidths, strict=True)
        mbu = statistics.median(size * options.new / second / b for second, b in rounds)
        print(f"{name:24} {rows * options.new / statistics.median(times):8.1f} {mbu:5.2f}")
    verdicts(seconds, options)


if __name__ == "__main__":
    main()
