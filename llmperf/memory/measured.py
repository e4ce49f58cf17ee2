"""The measured ledger: where the memory of a run went, row by row.

What a level holds beyond the rows before it is a row with a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmperf.models import cached_tensors


@dataclass(frozen=True)
class Row:
    """`bytes` at one level, or None with the reason in `explanation`."""

    name: str
    level: str
    bytes: int | None
    explanation: str


def ledger(
    module: torch.nn.Module, cache: Any, window: Mapping, base_bytes: int | None = None
) -> list[Row]:
    """What a run held. `cache` is a cache of transformers, `window` the closed window around it.

    `base_bytes` is what a process on the CPU holds before its model (`overhead`). A residual may be
    negative where weights are mapped from a file and were not all read.
    """
    rows = _tensors(module, cache)
    held = sum(row.bytes for row in rows)
    if window["allocated"]["status"] == "ok":
        return rows + _on_a_gpu(window, held)
    return rows + _on_the_cpu(window, held, base_bytes)


def _tensors(module: torch.nn.Module, cache: Any) -> list[Row]:
    cached = [t for layer in (cache.layers if cache else ()) for _, t in cached_tensors(layer)]
    found = (
        ("weights", module.parameters(), "those that are tied counted once"),
        ("buffers", module.buffers(), "what modules keep besides their weights"),
        ("kv cache", cached, "as they lie in the cache"),
    )
    return [
        Row(name, "allocated", *_storages(tensors, f"tensors, {why}"))
        for name, tensors, why in found
    ]


def _storages(tensors: Iterable[torch.Tensor], words: str) -> tuple[int, str]:
    """A view holds the whole of what it looks into; tied tensors count once."""
    held = [t.untyped_storage() for t in tensors if t.numel()]
    sizes = {s.data_ptr(): s.nbytes() for s in held}
    return sum(sizes.values()), f"{len(sizes)} {words}"


def _on_a_gpu(seen: Mapping, held: int) -> list[Row]:
    levels = (
        ("activations, logits, workspaces", "allocated", "allocated", "allocated at the peak"),
        ("allocator slack", "reserved", "reserved", "reserved but not allocated"),
        ("context and libraries", "process", "process_vram", "beyond torch's allocator"),
        ("idle use", "device", "device_used", "the device beyond this process"),
    )
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
    rss, uss, base = seen["rss"], seen["uss"], int(base_bytes or 0)
    if "max" not in rss:
        return [Row("residual", "process", None, rss["reason"])]
    beyond = int(rss["max"]) - held - base
    both, why = None, uss.get("reason", "held by other processes or mapped from files: RSS - USS")
    if "last" in uss:
        both = int(rss["last"] - uss["last"])
    return [
        Row("context and libraries", "process", base, "a fresh process before its model"),
        Row("residual", "process", beyond, "activations, logits, freed memory that is kept"),
        Row("of it shared", "of process", both, why),  # inside the rows above
    ]
