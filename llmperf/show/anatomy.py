"""One generation in phases: how long each keeps the processor, then waits for the device."""

import time
from collections import deque

import torch

from llmperf.decoding import pad
from llmperf.decoding.batch import cached
from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import Sampling, next_tokens, uniforms
from llmperf.models import Model

PHASES = ("tokenise", "prefill", "decode", "sampling", "detokenise")


class Stopwatch:
    """Milliseconds a phase: until the calls returned (processor), and from then until all queued
    work was done (waiting for the device). On the CPU the second is 0: calls return when done.
    """

    def __init__(self, device: str):
        self.device = device
        self.processor_ms, self.waiting_ms = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self._began = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add what happened since the last lap to `phase`."""
        returned = time.perf_counter()
        self.processor_ms[phase] += (returned - self._began) * 1e3
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.waiting_ms[phase] += (time.perf_counter() - returned) * 1e3
        self._began = time.perf_counter()


@torch.inference_mode()
def split(model: Model, text: str, new_tokens: int, sampling: Sampling, seed: int = 0) -> Stopwatch:
    """Generate `new_tokens` after `text` with the cached loop, each phase timed on its own.

    Waiting for the device after every phase makes the whole a little slower than the loop itself.
    """
    draws, out = uniforms([seed], new_tokens).to(model.torch_device), []
    watch = Stopwatch(model.device)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = pad([Request(0, tuple(ids), new_tokens, seed)], model.torch_device)
    watch.lap("tokenise")

    def draw(logits: torch.Tensor, step: int) -> torch.Tensor:
        watch.lap("decode" if step else "prefill")
        token = next_tokens(logits, sampling, draws[:, step])
        out.append(token.item())
        watch.lap("sampling")
        return token

    deque(cached(model, batch, draw), maxlen=0)
    model.tokenizer.decode(out)
    watch.lap("detokenise")
    return watch
