"""The measured ledger: where the memory of a run went, entry by entry.

Each level's measured peak, less all entries before it, is one more entry.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmperf.models import cached_tensors

# (entry, level, channel): the channel's peak, less all entries before it, is the entry.
GPU_LEVELS = (
    ("activations, logits, workspaces", "allocated", "allocated"),
    ("allocator slack", "reserved", "reserved"),
    ("context and libraries", "process", "process_vram"),
    ("in use before the start", "device", "device_used"),
)
CPU_LEVELS = (("residual", "process", "rss"),)


@dataclass(frozen=True)
class Entry:
    """`bytes` at one level beyond the entries before it, or None with the reason."""

    name: str
    level: str
    bytes: int | None
    reason: str | None = None


def ledger(
    module: torch.nn.Module, cache: Any, window: Mapping, base_bytes: int = 0
) -> list[Entry]:
    """What a run held. `cache` is a cache of transformers, `window` the closed window around it.

    `base_bytes` is what a process on the CPU holds before its model (`overhead`). A residual may be
    negative where weights are mapped from a file and were not all read.
    """
    cached = [t for layer in (cache.layers if cache else ()) for _, t in cached_tensors(layer)]
    found = {"weights": module.parameters(), "buffers": module.buffers(), "kv cache": cached}
    entries = [Entry(name, "allocated", _storage_bytes(tensors)) for name, tensors in found.items()]
    if window["allocated"]["status"] == "ok":
        levels = GPU_LEVELS
    else:
        levels = CPU_LEVELS
        entries.append(Entry("context and libraries", "process", int(base_bytes)))
    held = sum(entry.bytes for entry in entries)
    for name, level, channel in levels:
        peak, reason = window[channel].get("max"), window[channel].get("reason")
        entries.append(Entry(name, level, None if peak is None else int(peak - held), reason))
        held = held if peak is None else peak
    rss, uss = window["rss"], window["uss"]
    if levels is CPU_LEVELS and "last" in rss and "last" in uss:  # inside the entries above
        entries.append(Entry("of it shared", "of process", int(rss["last"] - uss["last"])))
    return entries


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """A view holds the whole of what it looks into; tied tensors count once."""
    held = [t.untyped_storage() for t in tensors if t.numel()]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())
