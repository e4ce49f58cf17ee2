"""The memory that a process costs before any model: measured in fresh interpreters.

Each child goes through stages and waits after every one. The parent starts the next child only when
the first has gone through all, and both stay alive: the first pays for what is shared, `further`
is what each one after it adds.
"""

import sys

import psutil

from llmperf.machine import gpu
from llmperf.machine.child import Child, ChildDied, Parent
from llmperf.machine.run_tool import Unknown
from llmperf.machine.timing import check_device, spread

STAGES = {
    "cpu": ("interpreter", "torch", "transformers", "forward"),
    "cuda": ("interpreter", "context", "libraries"),
}
STAGE_S = 120.0  # a cold disk takes this long to read torch's libraries, not longer


def overhead(device: str = "cpu", repeats: int = 3) -> dict:
    """Fixed memory of a process on `device` in bytes, `first` and `further`, each with its MAD.

    CPU: `rss` and `uss` (unique set size: not shared with any other process) after each stage, a
    fresh interpreter, `import torch`, `import transformers`, one forward pass of a tiny model. The
    `uss` of the first is that of a further one where other programs have the libraries loaded.
    GPU, from the device level through NVML, live tensors and the allocator's reserve taken off:
    `context` after one tensor, `libraries` what one forward pass adds, `total` of both.
    Where it cannot be measured both are None and `reasons` says why; the repeats that failed
    leave the others standing.
    """
    check_device(device)
    rounds, reasons = [], {}
    for _ in range(repeats):
        try:
            rounds.append(_round(device))
        except Unknown as error:
            reasons = {"first": str(error), "further": str(error)}
            if not rounds:
                break
    result: dict = {"device": device, "unit": "bytes", "repeats": len(rounds)}
    for place, which in enumerate(("first", "further")):
        result[which] = _merge([each[place] for each in rounds]) if rounds else None
    return {**result, "reasons": reasons}


def _merge(rounds: list[dict]) -> dict:
    """Samples of each figure over the rounds, as median, MAD and samples; None stays None."""
    merged = {}
    for name, value in rounds[0].items():
        samples = [each[name] for each in rounds]
        if isinstance(value, dict):
            merged[name] = _merge(samples)
        else:
            merged[name] = None if None in samples else spread(samples)
    return merged


def _round(device: str) -> tuple[dict, dict]:
    """The first and a further process, both alive at the end."""
    with _process(device) as first:
        alone = _measured(first, device)
        with _process(device) as second:
            return alone, _measured(second, device)


def _process(device: str) -> Child:
    return Child("llmperf.machine.overhead", device, name="fresh process")


def _measured(child: Child, device: str) -> dict:
    """CPU: what each stage reports. GPU: device-level use after a stage, minus that before the
    context and minus the child's own reserve. Raises Unknown when the child dies."""

    def enter(stage: str) -> dict:
        try:
            return child.ask(STAGE_S, stage=stage)
        except ChildDied as error:
            raise Unknown(f"{error} (in stage {stage!r})") from None

    if device == "cpu":
        return {stage: enter(stage) for stage in STAGES["cpu"]}
    enter("interpreter")
    before = _device_used(device)
    reserve = enter("context")["reserved"]
    context = _device_used(device) - before - reserve
    reserve = enter("libraries")["reserved"]
    total = _device_used(device) - before - reserve
    return {"context": context, "libraries": total - context, "total": total}


def _device_used(device: str) -> int:
    """Bytes in use on the card by all processes; `total - free`, see `gpu.memory`."""
    with gpu.nvml() as pynvml:
        try:
            info = gpu.memory(pynvml, gpu.nvml_handle(pynvml, device))
        except pynvml.NVMLError as error:
            raise Unknown(f"NVML does not tell the memory of {device}: {error}") from None
        return info["total"] - info["free"]


def _tiny_forward(device: str) -> None:
    """One forward pass that loads what a model of transformers loads, with almost no weights."""
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
    """The child: the name of a stage comes in, its report goes out."""
    parent = Parent()
    for message in parent.messages():  # in this thread: the stages import torch
        parent.send(**_enter(message["stage"], sys.argv[1]))


if __name__ == "__main__":
    main()
