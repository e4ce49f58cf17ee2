"""The weights' memory: the same numbers at better addresses."""

import mmap
from pathlib import Path

import pytest
import tiny_models
import torch

from llmperf.machine import private_memory


def tensors(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("case", ["llama-bias-tied", "gpt2"])
def test_same_numbers_in_memory_of_their_own(case, huge, monkeypatch):
    if not huge:  # as on Windows and macOS
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    module, _ = tiny_models.build(case)
    before = {name: t.detach() for name, t in tensors(module).items()}  # holds the old memory
    private_memory.copy_to_private_memory(module)
    after = tensors(module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    moved = [t for t in after.values() if t.is_contiguous() and t.numel()]
    assert not {t.data_ptr() for t in before.values()} & {t.data_ptr() for t in moved}
    assert all(t.data_ptr() % private_memory.LINE == 0 for t in moved)
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in moved)
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False))


def test_tied_weights_stay_tied():
    module, _ = tiny_models.build("llama-bias-tied")
    private_memory.copy_to_private_memory(module)
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")
def test_linux_is_asked_for_huge_pages():
    module, _ = tiny_models.build("llama")
    private_memory.copy_to_private_memory(module)
    address = next(module.parameters()).data_ptr()
    assert address % private_memory.HUGE == 0
    advised, inside = False, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags"):
            advised = "hg" in line.split()
    assert advised


def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch):
    class Block(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(private_memory.mmap, "mmap", Block)
    module, _ = tiny_models.build("llama")
    before = next(module.parameters()).clone()
    private_memory.copy_to_private_memory(module)
    assert torch.equal(next(module.parameters()), before)
