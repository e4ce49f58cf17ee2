"""The measured ledger: where the memory of a run went, row by row, beside the predicted one.

Weights and cache are counted in the tensors themselves. Each level that a device or the operating
system shows (allocated, reserved, process, device) is a total; what it holds beyond the rows before
it is a row with a name and a size, so that nothing stays unexplained without saying so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmperf.memory import Window

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
    held = sum(row.bytes for row in rows)
    if "max" in window.channels["allocated"].summary():
        return rows + _on_a_gpu(window, held)
    return rows + _on_the_cpu(window, held, base_bytes)


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


def _on_a_gpu(window: Window, held: int) -> list[Row]:
    """At the peak: each level less the one inside it."""
    seen = {name: channel.summary() for name, channel in window.channels.items()}
    allocated, reserved = seen["allocated"]["max"], seen["reserved"]["max"]
    rows = [
        _row("activations, logits, workspaces", "allocated", allocated - held,
             "allocated at the peak, beyond weights, buffers and cache"),
        _row("allocator slack", "reserved", reserved - allocated, "reserved but not allocated"),
    ]  # fmt: skip
    process, device = (seen[name].get("max") for name in ("process_vram", "device_used"))
    if process is None:
        why = seen["process_vram"]["reason"]
        rows.append(Row("context and libraries", "process", None, f"inside the next row: {why}"))
    else:
        why = "what the process holds beyond torch's allocator"
        rows.append(_row("context and libraries", "process", process - reserved, why))
    if device is None:
        return [*rows, Row("idle use", "device", None, seen["device_used"]["reason"])]
    inside = reserved if process is None else process
    return [*rows, _row("idle use", "device", device - inside, "the device beyond this process")]


def _on_the_cpu(window: Window, held: int, base_bytes: int | None) -> list[Row]:
    """The resident set at its peak; of it, what other processes share is told apart."""
    seen = {name: channel.summary() for name, channel in window.channels.items()}
    beyond = seen["rss"]["max"] - held
    names = "activations, logits, freed memory that is kept, tokenizer"
    if base_bytes is None:
        rest = Row("rest of the process", "process", beyond, f"interpreter, libraries, {names}")
        found = [rest]
    else:
        why = "a fresh process before its model, measured apart"
        found = [
            Row("context and libraries", "process", int(base_bytes), why),
            Row("residual", "process", int(beyond - base_bytes), names),
        ]
    return [*found, _shared(seen["rss"], seen["uss"])]


def _shared(rss: Mapping, uss: Mapping) -> Row:
    """Not a part of the sum but of the rows above: it has a level of its own."""
    if "last" not in uss:
        return Row("of it shared", "of process", None, uss["reason"])
    why = "pages that other processes share or that are mapped from files: RSS less USS at the end"
    return Row("of it shared", "of process", int(rss["last"] - uss["last"]), why)


def _row(name: str, level: str, size: float, why: str) -> Row:
    return Row(name, level, int(size), why)


def beside(rows: Sequence[Row], predicted: Sequence[Mapping]) -> list[dict]:
    """Measured and predicted in one table: name, level, measured, low, high (bytes, or None).

    `predicted` are the lines of a predicted ledger as dicts (`Ledger.to_dict()["lines"]`). Names
    that only one side has stand with None on the other.
    """
    lines = {line["name"]: line for line in predicted}
    mine = {row.name for row in rows}
    table = [
        {"name": r.name, "level": r.level, "measured": r.bytes,
         "low": lines.get(r.name, {}).get("low"), "high": lines.get(r.name, {}).get("high")}
        for r in rows
    ]  # fmt: skip
    return table + [
        {"name": n, "level": x["level"], "measured": None, "low": x["low"], "high": x["high"]}
        for n, x in lines.items()
        if n not in mine
    ]
