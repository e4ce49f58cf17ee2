"""The loops beside their peers, interleaved in one process: tokens/s, MBU, ratio to `generate`.

    python tests/benchmarks/bench_decoding.py [--dtypes fp32 bf16] [--rows 1 8] [--new 128]

llama.cpp takes part at batch 1 when `llama-cpp-python` is installed and `--gguf-fp32` or
`--gguf-bf16` names the same weights as GGUF. Keep the machine idle; the reached bandwidth is
printed beside the figures because a shared one varies.
"""

import argparse
import importlib.util
import time

import torch

from llmperf import ceilings, compiled, decoding, models, sampling, stats, workload

PROMPT = 32  # tokens


def generate(model, asked, cache=None):
    new = asked[0].max_new_tokens
    ids = torch.tensor([r.prompt_ids for r in asked], device=model.torch_device)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    if cache:
        options["cache_implementation"] = cache
    out = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[:, PROMPT:].T.tolist()


def runs(model, asked, gguf):
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
    if gguf and len(asked) == 1 and importlib.util.find_spec("llama_cpp"):
        found["llama.cpp"] = llama_cpp(gguf, asked[0])
    return found


def llama_cpp(gguf, request):
    from llama_cpp import Llama

    peer = Llama(gguf, n_ctx=256, n_threads=torch.get_num_threads(), verbose=False)

    def run():
        peer.reset()
        steps = peer.generate(list(request.prompt_ids), temp=0.0, repeat_penalty=1.0)
        return [[next(steps)] for _ in range(request.max_new_tokens)]

    return run


def measure(found, repeats):
    """Seconds of each run, one list a name; every round runs all of them once."""
    seconds = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(model, rows, new, repeats, gguf):
    asked = workload.build(model.tokenizer, rows, PROMPT, new).requests
    plan = compiled.prepare(model, rows, PROMPT + new, sampling.GREEDY)
    found = runs(model, asked, gguf)
    tokens = {name: run() for name, run in found.items()}  # warm-up
    seconds = measure(found, repeats)
    bandwidth = ceilings.read_bandwidth(model.device)["median"]
    weights = sum(p.nbytes for p in model.module.parameters())
    print(f"\n{model.label()}, batch {rows}, {PROMPT} + {new} tokens, {model.device},", end=" ")
    print(f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s read,", end=" ")
    print(f"compiled in {plan.compile_s:.1f} s{'; ' + plan.reason if plan.reason else ''}")
    print(f"{'':24} {'tokens/s':>9} {'MBU':>6} {'x generate':>11} {'interval':>15} {'same':>6}")
    for name, times in seconds.items():
        ratio = stats.ratio_interval(seconds["generate"], times, paired=True)
        median = torch.tensor(times).median().item()
        pairs = list(zip(sum(tokens[name], []), sum(tokens["cached"], []), strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        span = "too few" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        mbu = weights * new / median / bandwidth
        print(f"{name:24} {rows * new / median:9.1f} {mbu:6.2f} {ratio.value:11.2f}", end=" ")
        print(f"{span:>15} {same:6.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="tokens a request")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gguf-fp32")
    parser.add_argument("--gguf-bf16")
    options = parser.parse_args()
    for dtype in options.dtypes:
        model = models.load(options.model, dtype=dtype)
        for rows in options.rows:
            table(
                model, rows, options.new, options.repeats, getattr(options, f"gguf_{dtype}", None)
            )


if __name__ == "__main__":
    main()
