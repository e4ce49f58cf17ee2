"""What the memory sampler takes from the throughput of what it watches: `python bench_sampler.py`.

Rounds of one run watched and one unwatched, in shuffled order, compared in pairs. Wanted: less than
1 %. Takes about five minutes with the defaults, since a figure below 1 % needs that many pairs.
"""

import argparse

from llmperf import machine, models, stats
from llmperf.decoding.sampling import GREEDY
from llmperf.measure import Condition, paired
from llmperf.memory import INTERVAL_S, Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()
    model = models.load(arguments.model, dtype=arguments.dtype)
    condition = Condition(model, new_tokens=arguments.tokens, sampling=GREEDY)

    with Sampler() as sampler:

        def watched():
            with sampler.window():
                return condition.run()

        arms = {"watched": watched, "unwatched": condition.run}
        speeds = paired(arms, arguments.pairs)
    found = stats.ratio_interval(speeds["watched"], speeds["unwatched"], paired=True)
    print(f"{machine.caption(machine.describe())}; {model.label()}; busy: {machine.busy() or 'no'}")
    load = f"{arguments.pairs} pairs of {arguments.tokens} tokens"
    print(f"a sample every {INTERVAL_S * 1e3:.0f} ms, {load}")
    for name, values in speeds.items():
        print(f"{name:10} {stats.median_interval(values).value:8.2f} tokens/s")
    if found.low is None:
        print(f"watched / unwatched {found.value:.4f}; {found.reason}")
        return
    verdict = "yes" if found.low > 0.99 else "no" if found.high < 0.99 else "cannot tell"
    print(f"watched / unwatched {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] at 95 %")
    print(f"takes less than 1 %: {verdict}")


if __name__ == "__main__":
    main()
