"""The memory that a process costs before any model: measured in fresh interpreters.

On a card two processes live at the same time: the first pays for what they share, the second shows
what each further one adds.
"""

import copy
import sys

import psutil

from llmperf.machine import description, gpu
from llmperf.machine.child import Child, ChildDied, Parent
from llmperf.machine.units import Unknown

STAGES = ("interpreter", "torch", "transformers", "forward")  # on the CPU
STAGE_S = 120.0  # a cold disk takes this long to read torch's libraries, not longer


def cached(device: str = "cpu") -> dict:
    """`overhead(device)`, kept in the user's cache."""
    return description.cached_measurement("overhead", device, overhead)


def overhead(device: str = "cpu") -> dict:
    """Fixed memory in bytes of the `first` process on `device`, and of a `further` one.

    CPU: `rss` and `uss` (unique set size: not shared with any other process) after each of STAGES.
    GPU, from the device level through NVML, the allocator's reserve taken off: `context` after one
    tensor, `libraries` what one forward pass of a tiny model adds, `total` of both.
    Where it cannot be measured both are None and `reason` says why.
    """
    try:
        with _process(device) as first:
            alone = _measured(first, device)
            if device == "cpu":  # RSS counts shared pages in full for each: a second shows the same
                return {"first": alone, "further": copy.deepcopy(alone), "reason": None}
            with _process(device) as second:
                return {"first": alone, "further": _measured(second, device), "reason": None}
    except (Unknown, ChildDied) as error:
        return {"first": None, "further": None, "reason": str(error)}


def _process(device: str) -> Child:
    return Child("llmperf.machine.overhead", device, name="fresh process")


def _measured(child: Child, device: str) -> dict:
    """CPU: what each stage reports. GPU: device-level use after a stage, minus that before the
    context and minus the child's own reserve."""
    if device == "cpu":
        return {stage: child.ask(STAGE_S, stage=stage) for stage in STAGES}
    child.ask(STAGE_S, stage="interpreter")
    before, used = gpu.used_bytes(device), {}
    for stage in ("context", "libraries"):
        reserve = child.ask(STAGE_S, stage=stage)["reserved"]
        used[stage] = gpu.used_bytes(device) - before - reserve
    total = used["libraries"]
    return {"context": used["context"], "libraries": total - used["context"], "total": total}


def _tiny_forward(device: str) -> None:
    """Loads what a model of transformers loads, with almost no weights."""
    import torch
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval().to(device)
    with torch.inference_mode():
        model(torch.zeros((1, 8), dtype=torch.long, device=device))


def _enter(stage: str, device: str) -> dict:
    """Runs in the child: go through one stage and report."""
    if stage == "torch":
        import torch  # noqa: F401
    elif stage == "transformers":
        from transformers import GPT2LMHeadModel  # noqa: F401
    elif stage in ("forward", "libraries"):
        _tiny_forward(device)
    if device.startswith("cuda") and stage != "interpreter":
        import torch

        _ = torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        return {"reserved": torch.cuda.memory_reserved(device)}
    info = psutil.Process().memory_full_info()
    return {"rss": info.rss, "uss": info.uss}


def main() -> None:
    parent = Parent()
    for message in parent.messages():  # in this thread: the stages import torch
        parent.send(**_enter(message["stage"], sys.argv[1]))


if __name__ == "__main__":
    main()
