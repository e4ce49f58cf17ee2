"""Refused beforehand: a run that arithmetic says cannot fit into the memory that is free here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from llmperf import predict
from llmperf.machine import platform_word
from llmperf.measure.condition import Condition

# The memory of an endpoint is another program's; processes are refused by their own check, which
# knows those that are alive already.
ELSEWHERE = ("endpoint", "processes")
SPILLS = ("windows", "wsl2")  # a full card takes system memory there instead of failing


@dataclass(frozen=True)
class Memory:
    """Bytes for a run here: its `budget`, of which this process has `held` already."""

    budget: int
    held: int


def refusal(condition: Condition, memory_budget: int | None = None) -> str | None:
    """One sentence with the arithmetic when the run surely does not fit, else None.

    Only the ledger's low bound counts: what might fit is tried. `memory_budget` in bytes caps what
    the run may take beyond what this process holds; by default that is what is free, on Windows
    and WSL2 less a margin, since a full card spills there. Raises ValueError for a budget of more
    than is free.
    """
    book = ledger(condition)
    if book is None:
        return None
    here = memory(condition, memory_budget)
    try:
        predict.check_fits(book, here.budget + here.held)
    except predict.DoesNotFit as error:
        return f"refused beforehand: {error} ({here.held / predict.GIB:.2f} GiB of it held already)"
    return None


def ledger(condition: Condition) -> predict.Ledger | None:
    """The predicted ledger of a run, nothing else on the device; None for what runs elsewhere."""
    if condition.strategy in ELSEWHERE:
        return None
    m, (rows, threads) = condition.model, _rows_and_threads(condition)
    spec = predict.RunSpec(
        m.shape, m.dtype, m.quantization, rows, _longest(condition.prompt_tokens),
        _longest(condition.new_tokens), condition.loop, threads=threads,
        platform=platform_word(m.device),
    )  # fmt: skip
    return predict.memory(spec, idle_bytes=0)


def _rows_and_threads(c: Condition) -> tuple[int, int]:
    """Rows of a step and worker threads, at the least that the run needs at one moment."""
    if c.strategy == "batch":
        return min(c.options.get("batch_size", c.level), c.level), 0
    if c.strategy == "threads":
        return 1, min(c.options.get("workers", c.level), c.level)
    if c.strategy == "peer":
        return c.level if c.options.get("engine") != "llamacpp" else 1, 0
    return 1, 0


def cap(condition: Condition, memory_budget: int | None = None) -> float | None:
    """Where a full card spills, let torch's allocator fail at the budget instead; the share set.

    Only this process's allocator is told, the card is left as it is. None where nothing is capped.
    """
    device = condition.model.device
    if device == "cpu" or platform_word(device) not in SPILLS:
        return None
    import torch

    most = memory(condition, memory_budget).budget + torch.cuda.memory_reserved(device)
    share = min(1.0, most / torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share


def _longest(lengths: int | Sequence[int]) -> int:
    return max(lengths) if isinstance(lengths, Sequence) else lengths


def memory(condition: Condition, given: int | None = None) -> Memory:
    """What a run may use here. ValueError when nothing is free or more is given than is free."""
    device = condition.model.device
    if device == "cpu":
        ram = psutil.virtual_memory()
        free, total, held = ram.available, ram.total, psutil.Process().memory_info().rss
    else:
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # The context is there as well; its low bound, so that nothing is refused for it.
        context = predict.memory(
            predict.RunSpec(condition.model.shape, platform=platform_word(device))
        )
        held = torch.cuda.memory_reserved(device) + context.line("context and libraries").low
    return Memory(predict.budget(platform_word(device), free, total, given), held)
