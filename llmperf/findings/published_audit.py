"""The published study beside the arithmetic: its times audited, its memory figures predicted.

GB there means GiB. Nothing here is fitted to the figures it is compared with.
"""

import csv
from statistics import median

from llmperf import REFERENCE
from llmperf.models import ModelShape, shape_of
from llmperf.predict import GIB, Cost, at_rest, audit, card, kv_bytes, weights_read

# What the publication ran: GPT-2 in fp32 (0.46 GiB), Yi-6B in 16 bits (11.29 GiB), AWQ in 16 bits.
MODELS = {
    "GPT2": ("gpt2", "fp32"),
    "Yi-6B-Chat": ("yi-6b-chat", "fp16"),
    "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16"),
}
# Of Yi's deployment table: its 4 bits are AWQ, its 8 bits GPTQ.
YI_QUANTIZATION = {"4bits": "awq", "8bits": "gptq-8"}


def _read(name: str) -> list[dict]:
    with (REFERENCE / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, start=2):  # after the header, as an editor counts
        row["line"] = line
    return rows


def _model(name: str) -> tuple[ModelShape, str]:
    known, dtype = MODELS[name]
    return shape_of(known), dtype


def audited() -> list[dict]:
    """Every published log line with its `audit` against its card's memory bandwidth.

    The published loop keeps no cache: each step reads the weights, and nothing else is counted,
    since the lengths of the prompts are not given. A worker's line answers for its own steps, a
    group's line for those of all its workers; one step serves a whole batch.
    """
    rows = _read("measurements.csv")
    for row in rows:
        shape, dtype = _model(row["model"])
        whole = row["row"] == "total" and row["strategy"] != "batch"
        steps = int(row["new_tokens"]) * (int(row["concurrency"]) if whole else 1)
        read = Cost(weights_read(shape, dtype), 0.0) * steps
        ceiling = card(row["gpu"]).bandwidth_bytes_s
        row["audit"] = audit(read, float(row["seconds"]), ceiling)
    return rows


def allocated() -> list[dict]:
    """The published `allocated` figures that are measured at rest, with prediction and error.

    At rest: one request at a time, batches when they are done, processes, and of threads the one
    that finishes last and the line of the group. While other threads still run, their tensors of
    the moment are counted as well, so those lines are left out. Values in GiB.
    """
    rows = _read("measurements.csv")
    predicted = []
    for row, handles in zip(rows, _handles(rows), strict=True):
        if handles is None:
            continue
        shape, dtype = _model(row["model"])
        gib = at_rest(shape, dtype, handles=handles, masks=True).allocated / GIB
        error = gib - float(row["allocated_gb"])
        predicted.append({**row, "handles": handles, "predicted_gb": gib, "error_gb": error})
    return predicted


def _handles(rows: list[dict]) -> list[int | None]:
    """cuBLAS workspaces alive at each line: the main thread's, and those of the threads so far.

    A thread takes over the handle of one that has ended, so 1, 5 and then 10 threads have left 10.
    On the multiprocessing pages, where 2 threads go before 3, five are left and not three: there
    nothing was taken over. The pages do not say why (a stream for each thread would do it).
    """
    left: dict[tuple, int] = {}
    found = []
    for i, row in enumerate(rows):
        session = (row["experiment"], row["platform"], row["model"])
        threads = int(row["concurrency"])
        if row["strategy"] != "threads":
            found.append(1)  # other lines of a page stand before its threads, or are processes
            continue
        group = (*session, threads)
        following = rows[i + 1] if i + 1 < len(rows) else {}
        last = following.get("strategy") != "threads" or following.get("row") == "total"
        last = last or following.get("concurrency") != row["concurrency"] or row["row"] == "total"
        if group not in left:
            before = max((n for key, n in left.items() if key[:3] == session), default=0)
            reused = row["experiment"] != "multiprocessing"
            left[group] = max(before, threads) if reused else before + threads
        found.append(1 + left[group] if last else None)
    return found


def yi_deployment() -> list[dict]:
    """Yi's deployment table, each cell with the sequence length that it implies.

    A cell is taken as weights, buffers and workspace at rest plus the cache of `batch` rows, so
    `tokens` is (cell - rest) / (batch x bytes per token); `tokens_low` and `tokens_high` are for a
    cell rounded to whole GB. `predicted_gb` puts one length, the median over the model's batches
    from 16 up (where the rounding matters least), into all its cells. Where the cell is a bound
    (`>`), the tokens are one as well.
    """
    rows = _read("yi_vram.csv")
    for row in rows:
        name, _, bits = row["model"].partition("-Chat")
        shape = shape_of(f"{name}-chat".lower())
        rest = at_rest(shape, "fp16", YI_QUANTIZATION.get(bits.strip("-"))).allocated
        per_token = int(row["batch_size"]) * kv_bytes(shape, 1, 1, "fp16")
        cell = float(row["vram_gb"])
        row.update(batch_size=int(row["batch_size"]), rest_gb=rest / GIB)
        for key, off in (("tokens", 0), ("tokens_low", -0.5), ("tokens_high", 0.5)):
            row[key] = max(0, round(((cell + off) * GIB - rest) / per_token))
        row["per_token_bytes"] = per_token
    for row in rows:
        same = [
            r["tokens"]
            for r in rows
            if r["model"] == row["model"] and r["batch_size"] >= 16 and r["bound"] == "="
        ]
        row["typical_tokens"] = round(median(same))
        kv = row["typical_tokens"] * row["per_token_bytes"] / GIB
        row["predicted_gb"] = row["rest_gb"] + kv
    return rows
