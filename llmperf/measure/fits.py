"""Refused beforehand: a run that arithmetic says cannot fit into the memory that is free here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from llmperf import predict, strategies
from llmperf.machine.probes import PROBES
from llmperf.measure.condition import Condition

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
    known = strategies.STRATEGIES[condition.strategy]
    if known.checks_memory or not known.processes(condition.level, condition.options):
        return None
    m, platform = condition.model, platform_of(condition.model.device)
    threads = known.threads(condition.level, condition.options)
    rows = known.rows_per_step(condition.level, condition.options)
    strategy = "threads" if threads > 1 else "batch"
    return predict.memory(
        m.shape, m.dtype, m.quantization, rows, condition.prompt_tokens,
        _longest(condition.new_tokens), strategy, threads, platform, condition.loop, idle_bytes=0,
    )  # fmt: skip


def platform_of(device: str) -> str:
    """The ledger's word for where a model runs: cpu, linux, wsl2 or windows."""
    if device == "cpu":
        return "cpu"
    known = PROBES["os"]().lower()
    return known if known in SPILLS else "linux"


def cap(condition: Condition, memory_budget: int | None = None) -> float | None:
    """Where a full card spills, let torch's allocator fail at the budget instead; the share set.

    Only this process's allocator is told, the card is left as it is. None where nothing is capped.
    """
    device = condition.model.device
    if device == "cpu" or platform_of(device) not in SPILLS:
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
        context = predict.memory(condition.model.shape, platform=platform_of(device))
        held = torch.cuda.memory_reserved(device) + context.line("context and libraries").low
    return Memory(predict.budget(platform_of(device), free, total, given), held)
