"""What a device has free for a loaded model, and a cap where a full card would spill."""

import psutil

from llmperf import machine
from llmperf.machine.probes import ram_available
from llmperf.models import Model
from llmperf.predict.fits import SPILLS, budget
from llmperf.predict.ledger import least_context


def free_and_held(model: Model) -> tuple[int, int]:
    """Bytes that are free for a run, less a margin on Windows and WSL2 (then it may be below 0),
    and bytes that this process holds. Raises ValueError when others leave nothing."""
    device, platform = model.device, machine.platform_word(model.device)
    if device == "cpu":
        free, total, held = ram_available(), 0, psutil.Process().memory_info().rss
    else:
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # The context is there as well; its low bound, so that nothing is refused for it.
        held = torch.cuda.memory_reserved(device) + least_context(platform)
    return budget(platform, free + held, total) - held, held


def cap_allocator(model: Model, processes: int = 1) -> None:
    """Where a full card spills, let this process's allocator fail before that. So many processes
    share what is free."""
    device = model.device
    if device == "cpu" or machine.platform_word(device) not in SPILLS:
        return
    import torch

    further = max(0, free_and_held(model)[0]) // processes
    most = further + torch.cuda.memory_reserved(device)
    share = min(1.0, most / torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
