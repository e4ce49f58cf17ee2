"""The measured ledger: where the memory of a run went, row by row, beside the predicted one.

Weights and cache are counted in the tensors themselves. Each level that a device or the operating
system shows (allocated, reserved, process, device) is a total; what it holds beyond the rows before
it is a row with a name and a size, so that nothing stays unexplained without saying so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmperf.memory.sampler import Window

if TYPE_CHECKING:
    import torch

# Buffers in which AWQ, GPTQ and bitsandbytes keep quantised weights and their scales.
_QUANTISED = ("qweight", "qzeros", "scales", "g_idx", "SCB")


@dataclass(frozen=True)
class Row:
    """`bytes` at one level, or None with the reason in `explanation`."""

    name: str
    level: str
    bytes: int | None
    explanation: str


def ledger(
    model: Any, cache: Any = None, window: Window | None = None, base_bytes: int | None = None
) -> list[Row]:
    """What a run held: `model` a module (or a Model with one), `cache` a cache of transformers.

    `window` is the closed window around the run, `base_bytes` what a process holds before its model
    (`overhead.overhead`: `first`, `forward`, `rss`). Without a window only the tensors are counted.
    The rows up to a level add up to what was read at that level, so that a residual may be negative
    where weights are mapped from a file and were not all read. Raises ValueError for an open window
    or a model without weights.
    """
    module = getattr(model, "module", model)
    if module is None or not hasattr(module, "parameters"):
        raise ValueError("there are no weights to count: give a loaded model")
    if window is not None and not window.channels:
        raise ValueError("the window is still open: call ledger after its `with` block")
    rows = tensors(module, cache)
    if window is None:
        return rows
    seen = {name: channel.summary() for name, channel in window.channels.items()}
    held = sum(row.bytes for row in rows)
    gpu = "max" in seen["allocated"]
    return rows + (_on_a_gpu(seen, held) if gpu else _on_the_cpu(seen, held, base_bytes))


def tensors(module: Any, cache: Any = None) -> list[Row]:
    """The rows of weights, buffers and cache: bytes of each storage once, tied weights too."""
    named = list(module.named_buffers())
    packed = [t for name, t in named if name.rpartition(".")[2] in _QUANTISED]
    plain = [t for name, t in named if name.rpartition(".")[2] not in _QUANTISED]
    weights = [*module.parameters(), *packed]
    size, count = _storages(weights)
    kept, layers = _storages(cache_tensors(cache))
    return [
        Row("weights", "allocated", size, f"{count} tensors, those that are tied counted once"),
        Row("buffers", "allocated", _storages(plain)[0], "what modules keep beside their weights"),
        Row("kv cache", "allocated", kept, f"{layers} tensors as they lie in the cache"),
    ]


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Every tensor in a cache of transformers, whatever its kind; none for None."""
    import torch

    layers = getattr(cache, "layers", None) or []
    return [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]


def _storages(found: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Bytes and number of the storages: a view holds the whole of what it looks into."""
    held = [t.untyped_storage() for t in found if t.numel()]
    sizes = {s.data_ptr(): s.nbytes() for s in held}
    return sum(sizes.values()), len(sizes)


def _on_a_gpu(seen: Mapping, held: int) -> list[Row]:
    """At the peak: each level less the one inside it."""
    levels = (
        ("activations, logits, workspaces", "allocated", "allocated",
         "allocated at the peak, beyond weights, buffers and cache"),
        ("allocator slack", "reserved", "reserved", "reserved but not allocated"),
        ("context and libraries", "process", "process_vram",
         "what the process holds beyond torch's allocator"),
        ("idle use", "device", "device_used", "the device beyond this process"),
    )  # fmt: skip
    rows = []
    for name, level, channel, why in levels:
        peak = seen[channel].get("max")
        if peak is None:
            rows.append(Row(name, level, None, f"inside the next row: {seen[channel]['reason']}"))
        else:
            rows.append(Row(name, level, int(peak - held), why))
            held = peak
    return rows


def _on_the_cpu(seen: Mapping, held: int, base_bytes: int | None) -> list[Row]:
    """The resident set at its peak, and how much of it other processes hold too."""
    rss, uss = seen["rss"], seen["uss"]
    if "max" not in rss:
        return [Row("rest of the process", "process", None, rss["reason"])]
    beyond, names = int(rss["max"] - held), "activations, logits, freed memory that is kept"
    if base_bytes is None:
        rows = [Row("rest of the process", "process", beyond, f"interpreter, libraries, {names}")]
    else:
        why = "a fresh process before its model, measured apart"
        rows = [
            Row("context and libraries", "process", int(base_bytes), why),
            Row("residual", "process", beyond - int(base_bytes), f"{names}, tokenizer"),
        ]
    both, why = None, uss.get("reason", "held by other processes or mapped from files: RSS - USS")
    if "last" in uss:
        both = int(rss["last"] - uss["last"])
    return [*rows, Row("of it shared", "of process", both, why)]  # inside the rows above


def against_prediction(rows: Sequence[Row], predicted: Sequence[Mapping]) -> list[dict]:
    """Measured and predicted in one table: name, level, measured, low, high (bytes, or None).

    `predicted` are the lines of a predicted ledger as dicts (`Ledger.to_dict()["lines"]`). Names
    that only one side has stand with None on the other.
    """
    lines = {line["name"]: line for line in predicted}
    found = {row.name: row for row in rows}
    return [
        {
            "name": name,
            "level": found[name].level if name in found else lines[name]["level"],
            "measured": found[name].bytes if name in found else None,
            "low": lines.get(name, {}).get("low"),
            "high": lines.get(name, {}).get("high"),
        }
        for name in {**found, **lines}
    ]
