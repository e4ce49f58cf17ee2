"""The memory sampler: watches this process, its children and a GPU from another process."""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Sequence

from llmperf.machine.child import Child, ChildDied
from llmperf.machine.gpu import torch_in_use
from llmperf.memory.channels import CHANNELS, summary

INTERVAL_S = 0.02
NO_ALLOCATOR = "torch has no caching allocator on the CPU"
ANSWER_S = 60.0  # the first answer includes imports; a busy machine takes its time


class Sampler(contextlib.AbstractContextManager):
    """A sampling process. It samples inside each `window`; the next window replaces a dead one.

    `device`: torch's name of the model's device, by default the card that this process uses, else
    the CPU. For the CPU no card is watched.
    """

    def __init__(self, device: str | None = None):
        torch = torch_in_use()
        self._device = device or (f"cuda:{torch.cuda.current_device()}" if torch else "cpu")
        self._windows = 0
        self._child = self._start()

    def _start(self) -> Child:
        arguments = (os.getpid(), INTERVAL_S, self._device)
        return Child("llmperf.memory.probe", *arguments, name="memory sampler")

    def __exit__(self, *_) -> None:
        self._child.end()

    @contextlib.contextmanager
    def window(self, without: Sequence[int] = ()) -> Iterator[dict[str, dict]]:
        """What happens inside: each channel's summary, filled on leaving.

        `without`: ids of child processes that only wait, and do not count as measured.
        """
        if not self._child.alive:
            self._child.end()
            self._child = self._start()
        trim_heap()
        if torch := self._torch():
            torch.cuda.empty_cache()  # else a small run shows what a large one before it reserved
            torch.cuda.reset_peak_memory_stats(self._device)
        self._windows += 1
        died = self._answer(do="start", without=list(without))[1]
        window, before = {}, self._allocator()
        try:
            yield window
        except BaseException:
            self._child.send(do="stop", window=self._windows)  # nobody waits for the samples
            raise
        found, died_now = ({}, died) if died else self._answer(do="stop")
        after = self._allocator()
        for name in ("allocated", "reserved"):  # before, torch's exact peak, now
            now, peak = (f"{name}_bytes.all.{which}" for which in ("current", "peak"))
            values = [before.get(now, 0), after.get(peak, 0), after.get(now, 0)]
            found[name] = summary(name, values if after else (), NO_ALLOCATOR)
        window |= {n: found.get(n) or summary(n, (), died or died_now) for n in CHANNELS}

    def _torch(self):
        return None if self._device == "cpu" else torch_in_use()

    def _allocator(self) -> dict:
        torch = self._torch()
        return torch.cuda.memory_stats(self._device) if torch else {}

    def _answer(self, **message) -> tuple[dict, str | None]:
        """The answer for this window, or why the sampling process gave none."""
        self._child.send(**message, window=self._windows)
        try:
            while (answer := self._child.receive(ANSWER_S))["window"] != self._windows:
                pass  # of a window that was left by an exception
            return answer["channels"], None
        except ChildDied as error:
            return {}, f"the sampler died: {error}"


def trim_heap() -> None:
    """Return freed memory to the operating system, where the C library can (glibc on Linux).

    Else a small run after a large one shows the large one's resident set. Young garbage only is
    collected: a full collection takes a quarter of a second once transformers is loaded.
    """
    gc.collect(1)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:  # musl has none
        trim(0)
