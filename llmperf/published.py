"""The published study beside the arithmetic: its times audited, its memory figures predicted."""

import csv

from llmperf import costs
from llmperf.cards import card
from llmperf.costs import Cost
from llmperf.roofline import audit
from llmperf.shapes import REFERENCE, preset
from llmperf.tensors import ModelShape

# What the publication says of its models: GPT-2 in fp32 (0.46 GiB), Yi-6B in 16 bits (11.29 GiB).
PUBLISHED_MODELS = {
    "GPT2": ("gpt2", "fp32"),
    "Yi-6B-Chat": ("yi-6b-chat", "fp16"),
    "Yi-34B-Chat-4bits": ("yi-34b-chat-4bits", "fp16"),
}


def audit_published() -> list[dict]:
    """Every published log line with its `audit` against its card's memory bandwidth.

    The published loop keeps no cache: each step reads the weights, and nothing else is counted,
    since the lengths of the prompts are not given. A worker's line answers for its own steps, a
    group's line for those of all its workers.
    """
    with (REFERENCE / "measurements.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):  # as the file's line numbers, after the header
        shape, dtype = _published_model(row["model"])
        streams = int(row["concurrency"]) if row["row"] == "total" else 1
        if row["strategy"] == "batch":
            streams = 1  # one step serves the whole batch
        steps = streams * int(row["new_tokens"])
        read = Cost(costs.weights_read(shape, dtype), 0.0) * steps
        ceiling = card(row["gpu"]).bandwidth_bytes_s
        row.update(line=number, audit=audit(read, float(row["seconds"]), ceiling))
    return rows


def _published_model(name: str) -> tuple[ModelShape, str]:
    preset_name, dtype = PUBLISHED_MODELS[name]
    return preset(preset_name), dtype
