"""The published study's figures as tables: what notebooks draw in and findings are checked against.

Source: "Large Language Model Inference Performance" (6 February 2024), transcribed in
data/reference. GB there means GiB.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from llmperf import REFERENCE

if TYPE_CHECKING:
    import pandas as pd

NEW_TOKENS = 256  # every published line generates as many


@cache
def _table(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(REFERENCE / f"{name}.csv")


def measurements(**wanted) -> pd.DataFrame:
    """All 164 log lines, or those whose columns have the wanted values.

    Adds `label`: GPU, model and platform.
    """
    rows = _table("measurements").copy()
    rows["label"] = rows.gpu.str.removesuffix(" Laptop") + ", " + rows.model + ", " + rows.platform
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def groups(strategy: str, **wanted) -> pd.DataFrame:
    """One row a group of requests in flight: its median seconds with the fastest and slowest run,
    tokens/s as printed (256 tokens assumed for each request), reserved and allocated GB.

    `times_one` is its time over that of one request, as the same page has it.
    A group without a total line (processes, and threads beside them) takes its slowest worker's
    time. The batch rows that the multiprocessing page repeats are counted once.
    """
    rows = measurements(strategy=strategy, **wanted)
    rows = rows[~((rows.experiment == "multiprocessing") & (rows.strategy == "batch"))]
    if strategy == "batch":
        rows = rows[rows.row == "total"]
    names = ["experiment", "platform", "gpu", "model", "label", "strategy", "concurrency"]
    seconds = "median" if strategy in ("batch", "sequential") else "max"
    out = rows.groupby(names, as_index=False).agg(
        seconds=("seconds", seconds),
        fastest_s=("seconds", "min"),
        slowest_s=("seconds", "max"),
        reserved_gb=("reserved_gb", "max"),
        allocated_gb=("allocated_gb", "min"),
    )
    out["output_tokens_per_s"] = out.concurrency * NEW_TOKENS / out.seconds
    one = measurements(strategy="sequential").groupby(["experiment", "label"]).seconds.median()
    out["times_one"] = out.seconds / [
        one.get(page, float("nan")) for page in zip(out.experiment, out.label, strict=True)
    ]
    return out


def single_seconds(
    platform: str, gpu: str = "RTX A2000 Laptop", model: str = "GPT2"
) -> list[float]:
    """The published times of one request alone, in seconds, as printed."""
    return measurements(strategy="sequential", platform=platform, gpu=gpu, model=model)[
        "seconds"
    ].tolist()


def process_vram() -> pd.DataFrame:
    """Device memory against the number of processes, GPT-2 on the A2000."""
    return _table("process_vram").copy()


def idle_vram() -> pd.DataFrame:
    """Three machines at rest."""
    return _table("idle_vram").copy()


def yi_vram() -> pd.DataFrame:
    """The Yi project's deployment table, which the publication quotes."""
    return _table("yi_vram").copy()
