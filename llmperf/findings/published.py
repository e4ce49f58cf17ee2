"""The published study as tables and records, audited, its memory predicted. GB means GiB."""

from functools import cache

import pandas as pd

from llmperf import REFERENCE, models, predict
from llmperf.machine import GIB
from llmperf.measure import Record

NEW_TOKENS = 256  # every published line generates as many
# What the publication ran: GPT-2 in fp32, Yi-6B in 16 bits, Yi-34B in 4 bits (AWQ).
MODELS = {
    "GPT2": ("gpt2", "fp32", None),
    "Yi-6B-Chat": ("yi-6b-chat", "fp16", None),
    "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16", "awq"),
}

WORDS = ("experiment", "platform", "gpu", "model", "strategy", "row")
AT_LEAST = {"concurrency": 1, "new_tokens": 1, "run": 1, "handles": 0,
            "seconds": 0.001, "reserved_gb": 0.0, "allocated_gb": 0.0}  # fmt: skip
COLUMNS = dict.fromkeys(WORDS, str) | {name: type(least) for name, least in AT_LEAST.items()}


def table(name: str) -> pd.DataFrame:
    """A table of data/reference, such as `process_vram` and `idle_vram`."""
    return pd.read_csv(REFERENCE / f"{name}.csv")


def measurements(**wanted) -> pd.DataFrame:
    """All 164 log lines, or those whose columns have the wanted values.

    Adds `label` (GPU, model and platform) and `line` (as an editor counts in the file).
    """
    rows = table("measurements")
    try:
        rows = rows.astype(COLUMNS)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"measurements.csv cannot be read: {error}") from None
    if rows[list(COLUMNS)].isna().any(axis=None):
        raise ValueError("measurements.csv has an empty cell")
    if not rows.model.isin(MODELS).all():
        raise ValueError(f"measurements.csv: the models are {', '.join(MODELS)}")
    for column, least in AT_LEAST.items():
        if not rows[column].between(least, 1e6).all():
            raise ValueError(f"measurements.csv: {column} must be from {least} to a million")
    rows["label"] = rows.gpu.str.removesuffix(" Laptop") + ", " + rows.model + ", " + rows.platform
    rows["line"] = rows.index + 2
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def _not_quoted(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the totals that the multiprocessing page repeats from the batch page."""
    return rows[~(rows.experiment.eq("multiprocessing") & rows.row.eq("total"))]


def groups(strategy: str, **wanted) -> pd.DataFrame:
    """One row a group of requests in flight: median seconds, tokens/s (256 a request assumed), GB;
    `possible`: no line of it is too fast for its card.

    `times_one` is its time over that of one request on the same page. A group of workers takes the
    time of its total line, or of its slowest worker.
    """
    rows = _not_quoted(measurements(strategy=strategy, **wanted))
    names = ["experiment", "platform", "gpu", "model", "label", "strategy", "concurrency"]
    rows["possible"] = rows.line.map(audited().set_index("line").audit.map(lambda a: a.plausible))
    rows["seconds_of_run"] = rows.groupby("run").seconds.transform("max")
    out = rows.groupby(names, as_index=False).agg(
        seconds=("seconds_of_run", "median"),
        fastest_s=("seconds", "min"),
        possible=("possible", "all"),
        reserved_gb=("reserved_gb", "max"),
    )
    out["output_tokens_per_s"] = out.concurrency * NEW_TOKENS / out.seconds
    alone = measurements(strategy="sequential").groupby(["experiment", "label"]).seconds.median()
    pages = zip(out.experiment, out.label, strict=True)
    out["times_one"] = out.seconds / [alone.get(page, float("nan")) for page in pages]
    return out


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

    Lines at which other threads still run, with their tensors of the moment, are left out.
    """
    rows = measurements()
    rows = rows[rows.handles > 0].reset_index(drop=True)
    rows["predicted_gb"] = [
        predict.at_rest(*_model(r.model), handles=r.handles, masks=True).allocated / GIB
        for r in rows.itertuples()
    ]
    rows["error_gb"] = rows.predicted_gb - rows.allocated_gb
    return rows


def yi_deployment() -> pd.DataFrame:
    """Yi's deployment table, which the publication quotes, each cell with its implied length.

    A cell is taken as weights and workspace at rest (`rest_gb`) plus the cache of `batch_size`
    rows. `tokens` is (cell - `rest_gb`) divided by the cache bytes of one position in all rows;
    `tokens_low` and `tokens_high` allow for a cell rounded to whole GB. `predicted_gb` uses, in all
    cells of a model, the median `tokens` of its batches from 16 up: rounding matters least there.
    """
    rows = table("yi_vram").astype({"quantization": object})
    shapes = [models.shape_of(preset) for preset in rows.preset]
    bits = rows.quantization.where(rows.quantization.notna(), None)
    pairs = zip(shapes, bits, strict=True)
    rows["rest_gb"] = [predict.at_rest(shape, "fp16", q).allocated / GIB for shape, q in pairs]
    rows["per_token_bytes"] = rows.batch_size * [predict.kv_bytes(s, 1, 1, "fp16") for s in shapes]
    for column, off in (("tokens", 0), ("tokens_low", -0.5), ("tokens_high", 0.5)):
        tokens = (rows.vram_gb + off - rows.rest_gb) * GIB / rows.per_token_bytes
        rows[column] = tokens.round().clip(lower=0).astype(int)
    exact = rows[rows.batch_size.ge(16) & rows.bound.eq("=")].groupby("model").tokens.median()
    rows["typical_tokens"] = rows.model.map(exact).round().astype(int)
    rows["predicted_gb"] = rows.rest_gb + rows.typical_tokens * rows.per_token_bytes / GIB
    return rows


def console_line(r: Record) -> str:
    """The line that the publication printed after a run, from a record. GB means GiB, `free` what
    torch's allocator keeps without using it."""
    card = next(iter(r.environment.get("gpus") or []), {})
    held = [r.memory.get(name, {}).get("last") for name in ("reserved", "allocated")]
    sizes = (*held, held[0] - held[1], card.get("memory_total_bytes")) if None not in held else ()
    words = ["unknown" if x is None else f"{x / GIB:.3f} GB" for x in sizes]
    names = ("reserved", "allocated", "free", "total")
    vram = ", ".join(f"{n} {word}" for n, word in zip(names, words, strict=False))
    work = f"{r.condition['level']} x {r.condition['new_tokens']} tokens"
    return (
        f"Generated {work} and took {r.metrics['duration_s']:.3f} s; GPU VRAM:"
        f" {vram or 'none, it ran on the processor'} ---> {r.condition['strategy']}"
    )


@cache
def published_records() -> tuple[Record, ...]:
    """One record a published run, so that it can be judged and audited like anyone's."""
    found = []
    for _, lines in _not_quoted(audited()).groupby("run", sort=False):
        r = max(lines.itertuples(), key=lambda line: (line.row == "total", line.seconds))
        level, tokens = r.concurrency, r.concurrency * r.new_tokens
        metrics = {"duration_s": r.seconds, "output_tokens": tokens, "requests_ok": level,
                   "output_tokens_per_s": tokens / r.seconds}  # fmt: skip
        memory = {"reserved": {"max": r.reserved_gb}, "allocated": {"first": r.allocated_gb}}
        plausible = all(a.plausible for a in lines.audit)
        found.append(
            _record(r, r.strategy, level, r.experiment, metrics, memory, r.line, plausible)
        )
    used = table("process_vram")
    idle = used[used.processes == 0].set_index("platform").device_used_gb
    for r in used[used.processes > 0].itertuples():  # this table has no times
        memory = {"device_used": {"max": r.device_used_gb},
                  "device_idle": {"max": idle[r.platform]},
                  "reserved": {"max": r.in_process_gb}}  # fmt: skip
        found.append(_record(r, "processes", r.processes, "VRAM", {}, memory))
    return tuple(found)


def _record(r, strategy, level, page, metrics, memory, repeat=0, plausible=True) -> Record:
    name, dtype, quantization = MODELS[r.model]
    weights = predict.weights_bytes(models.shape_of(name), dtype, quantization)
    channels = {
        channel: {"status": "ok", "unit": "bytes"} | {k: v * GIB for k, v in values.items()}
        for channel, values in memory.items()
    }
    condition = {"strategy": strategy, "level": level, "loop": "recompute", "options": {},
                 "model": name, "dtype": dtype, "quantization": quantization, "weights": "trained",
                 "device": "cuda", "prompt_tokens": None, "new_tokens": NEW_TOKENS}  # fmt: skip
    return Record(
        experiment=f"published {page}",
        repeat=repeat,
        condition=condition,
        environment={"os": r.platform, "gpus": [{"name": r.gpu}]},
        metrics=metrics,
        memory=channels,
        prediction={"weights_bytes": weights, "plausible": plausible},
    )
