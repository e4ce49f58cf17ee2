"""The published study as tables: rows as a frame, as records, audited, and its memory predicted.

Source: "Large Language Model Inference Performance" (6 February 2024), transcribed in
data/reference. GB there means GiB. Nothing here is fitted to the figures it is compared with.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from llmperf import REFERENCE, models, predict
from llmperf.measure import Record

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
NEW_TOKENS = 256  # every published line generates as many
# What the publication ran: GPT-2 in fp32, Yi-6B in 16 bits, Yi-34B in 4 bits (AWQ).
MODELS = {
    "GPT2": ("gpt2", "fp32", None),
    "Yi-6B-Chat": ("yi-6b-chat", "fp16", None),
    "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16", "awq"),
}
YI_QUANTIZATION = {"4bits": "awq", "8bits": "gptq-8"}  # of Yi's deployment table


@cache
def _table(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(REFERENCE / f"{name}.csv")


def measurements(**wanted) -> pd.DataFrame:
    """All 164 log lines, or those whose columns have the wanted values.

    Adds `label` (GPU, model and platform), `line` (as an editor counts in the file), and `run`: a
    batch or a request alone is a run a line, a group of workers is one run.
    """
    rows = _table("measurements").copy()
    rows["label"] = rows.gpu.str.removesuffix(" Laptop") + ", " + rows.model + ", " + rows.platform
    rows["line"] = rows.index + 2
    group = rows.groupby(["experiment", "label", "strategy", "concurrency"], sort=False)
    alone = (group.row.transform("nunique") == 1) & (rows.row.eq("total") | rows.concurrency.eq(1))
    rows["run"] = group.ngroup() + rows.line.where(alone, 0) / 1000
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def _not_quoted(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the totals that the multiprocessing page repeats from the batch page."""
    return rows[~(rows.experiment.eq("multiprocessing") & rows.row.eq("total"))]


def groups(strategy: str, **wanted) -> pd.DataFrame:
    """One row a group of requests in flight: its median seconds with the fastest and slowest line,
    tokens/s as printed (256 tokens assumed for each request), reserved and allocated GB.

    `times_one` is its time over that of one request on the same page. A group of workers takes the
    time of its total line, or of its slowest worker.
    """
    rows = _not_quoted(measurements(strategy=strategy, **wanted))
    names = ["experiment", "platform", "gpu", "model", "label", "strategy", "concurrency"]
    rows["seconds_of_run"] = rows.groupby("run").seconds.transform("max")
    out = rows.groupby(names, as_index=False).agg(
        seconds=("seconds_of_run", "median"),
        fastest_s=("seconds", "min"),
        slowest_s=("seconds", "max"),
        reserved_gb=("reserved_gb", "max"),
        allocated_gb=("allocated_gb", "min"),
    )
    out["output_tokens_per_s"] = out.concurrency * NEW_TOKENS / out.seconds
    alone = measurements(strategy="sequential").groupby(["experiment", "label"]).seconds.median()
    out["times_one"] = out.seconds / [
        alone.get(page, float("nan")) for page in zip(out.experiment, out.label, strict=True)
    ]
    return out


def process_vram() -> pd.DataFrame:
    """Device memory against the number of processes, GPT-2 on the A2000."""
    return _table("process_vram").copy()


def idle_vram() -> pd.DataFrame:
    """Three machines at rest."""
    return _table("idle_vram").copy()


def audited() -> pd.DataFrame:
    """Every log line with its `audit` against its card's memory bandwidth.

    The published loop keeps no cache: each step reads the weights, and nothing else is counted,
    since the lengths of the prompts are not given. A worker's line answers for its own steps, a
    total for those of all its workers; one step serves a whole batch.
    """
    rows = measurements()
    of_workers = rows.row.eq("total") & (rows.groupby("run").row.transform("nunique") > 1)
    workers = rows.concurrency.where(of_workers, 1)
    rows["audit"] = [
        predict.audit(
            predict.Cost(predict.weights_read(*_model(r.model)), 0.0) * (r.new_tokens * n),
            r.seconds,
            predict.card(r.gpu).bandwidth_bytes_s,
        )
        for r, n in zip(rows.itertuples(), workers, strict=True)
    ]
    return rows


def _model(name: str):
    """The shape and the dtype of a published model; 4 bits are in the shape of the checkpoint."""
    known, dtype, _ = MODELS[name]
    return models.shape_of(known), dtype


def allocated() -> pd.DataFrame:
    """The published `allocated` figures at rest, with `predicted_gb` and `error_gb`.

    At rest: one request at a time, batches when they are done, processes, and of threads the one
    that finishes last and the line of the group. While other threads still run, their tensors of
    the moment are counted as well, so those lines are left out. `handles`: cuBLAS workspaces alive.
    """
    rows = measurements().set_index("line", drop=False)
    rows["handles"] = 1
    threads = measurements(strategy="threads").set_index("line", drop=False)
    rows.loc[threads.index, "handles"] = _thread_handles(threads)
    rows = rows[rows.handles > 0].reset_index(drop=True)
    rows["predicted_gb"] = [
        predict.at_rest(*_model(r.model), handles=r.handles, masks=True).allocated / GIB
        for r in rows.itertuples()
    ]
    rows["error_gb"] = rows.predicted_gb - rows.allocated_gb
    return rows


def _thread_handles(rows: pd.DataFrame) -> list[int]:
    """Workspaces alive at each line: the main thread's and those of the threads so far; 0 where
    other threads still run.

    A thread takes over the handle of one that has ended, so 1, 5 and then 10 threads have left 10.
    On the multiprocessing pages, where 2 threads go before 3, five are left and not three: there
    nothing was taken over. The pages do not say why (a stream for each thread would do it).
    """
    left: dict[tuple, dict[int, int]] = {}
    found = []
    for r in rows.itertuples():
        page = left.setdefault((r.experiment, r.label), {})
        if r.concurrency not in page:
            before, n = max(page.values(), default=0), r.concurrency
            page[n] = before + n if r.experiment == "multiprocessing" else max(before, n)
        after = rows.loc[r.line + 1] if r.line + 1 in rows.index else None
        runs_on = after is not None and after.concurrency == r.concurrency and after.row != "total"
        found.append(0 if runs_on and r.row != "total" else 1 + page[r.concurrency])
    return found


def yi_deployment() -> pd.DataFrame:
    """Yi's deployment table, which the publication quotes, each cell with its implied length.

    A cell is taken as weights, buffers and workspace at rest (`rest_gb`) plus the cache of `batch`
    rows; `tokens` is what is left over bytes per token, `tokens_low` and `tokens_high` for a cell
    rounded to whole GB. `predicted_gb` puts one length, the median over the model's batches from 16
    up (where the rounding matters least), into all its cells. Where the cell is a bound (`>`), the
    tokens are one as well.
    """
    rows = _table("yi_vram").copy()
    names = rows.model.str.partition("-Chat")
    known = [models.shape_of(f"{name}-chat".lower()) for name in names[0]]
    quantized = [YI_QUANTIZATION.get(bits.strip("-")) for bits in names[2]]
    pairs = zip(known, quantized, strict=True)
    at_rest = [predict.at_rest(shape, "fp16", bits).allocated for shape, bits in pairs]
    rows["rest_gb"] = [x / GIB for x in at_rest]
    rows["per_token_bytes"] = rows.batch_size * [predict.kv_bytes(k, 1, 1, "fp16") for k in known]
    for column, off in (("tokens", 0), ("tokens_low", -0.5), ("tokens_high", 0.5)):
        tokens = ((rows.vram_gb + off) * GIB - at_rest) / rows.per_token_bytes
        rows[column] = tokens.round().clip(lower=0).astype(int)
    exact = rows[rows.batch_size.ge(16) & rows.bound.eq("=")].groupby("model").tokens.median()
    rows["typical_tokens"] = rows.model.map(exact).round().astype(int)
    rows["predicted_gb"] = rows.rest_gb + rows.typical_tokens * rows.per_token_bytes / GIB
    return rows


@cache
def published_records() -> tuple[Record, ...]:
    """One record a published run, so that it can be judged like anyone's.

    Times that no card could reach are marked implausible by the same audit as anyone's.
    """
    found = []
    for _, lines in _not_quoted(audited()).groupby("run", sort=False):
        r = max(lines.itertuples(), key=lambda line: (line.row == "total", line.seconds))
        level, tokens = r.concurrency, r.concurrency * r.new_tokens
        metrics = {"duration_s": r.seconds, "output_tokens": tokens, "requests_ok": level,
                   "output_tokens_per_s": tokens / r.seconds}  # fmt: skip
        memory = {"reserved": {"max": r.reserved_gb}, "allocated": {"first": r.allocated_gb}}
        found.append(_record(r, r.strategy, level, r.experiment, metrics, memory, repeat=r.line,
                             plausible=all(a.plausible for a in lines.audit),
                             why=lines.audit.iloc[0].sentence))  # fmt: skip
    used = process_vram()
    idle = used[used.processes == 0].set_index("platform").device_used_gb
    for r in used[used.processes > 0].itertuples():  # this table has no times
        memory = {"device_used": {"first": idle[r.platform], "max": r.device_used_gb},
                  "reserved": {"max": r.in_process_gb}}  # fmt: skip
        found.append(_record(r, "processes", r.processes, "VRAM", {}, memory))
    return tuple(found)


def _record(r, strategy, level, page, metrics, memory, repeat=0, **prediction) -> Record:
    name, dtype, quantization = MODELS[r.model]
    weights = predict.weights_bytes(models.shape_of(name), dtype, quantization)
    return Record(
        experiment=f"published {page}",
        repeat=repeat,
        condition={
            "strategy": strategy,
            "level": level,
            "loop": "recompute",
            "options": {},
            "model": name,
            "dtype": dtype,
            "quantization": quantization,
            "weights": "trained",
            "device": "cuda",
            "prompt_tokens": None,  # not given
            "new_tokens": NEW_TOKENS,
        },
        environment={"os": r.platform, "gpus": [{"name": r.gpu}]},
        metrics=metrics,
        memory={
            channel: {"status": "ok", "unit": "bytes"} | {k: v * GIB for k, v in values.items()}
            for channel, values in memory.items()
        },
        prediction={"weights_bytes": weights} | prediction,
    )
