"""One generation in phases: how long each keeps the processor, then waits for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmperf.decoding import last_column, pad, positions
from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import Sampling, next_tokens, uniforms
from llmperf.models import cache_argument

if TYPE_CHECKING:
    from llmperf.models import Model

PHASES = ("tokenise", "prefill", "decode", "sampling", "detokenise")


@dataclass
class Stopwatch:
    """Milliseconds a phase: until the calls returned (processor), and from then until all queued
    work was done (waiting for the device). On the CPU the second is 0: calls return when done.
    """

    device: str
    processor_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    waiting_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to the phase `name`."""
        began = time.perf_counter()
        yield
        returned = time.perf_counter()
        self.processor_ms[name] += (returned - began) * 1e3
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()
            self.waiting_ms[name] += (time.perf_counter() - returned) * 1e3


def split(model: Model, text: str, new_tokens: int, sampling: Sampling, seed: int = 0) -> Stopwatch:
    """Generate `new_tokens` after `text` with the cached loop, each phase timed on its own.

    Waiting for the device after every phase makes the whole a little slower than the loop itself.
    """
    import torch
    from transformers import DynamicCache

    watch = Stopwatch(model.device)
    with torch.inference_mode():
        with watch.phase("tokenise"):
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = pad([Request(0, tuple(ids), new_tokens, seed)], model.torch_device)
        draws = uniforms([seed], new_tokens).to(model.torch_device)
        cache = DynamicCache(config=model.module.config)
        column, position, out = batch.ids, positions(batch.mask), []
        for step in range(new_tokens):
            with watch.phase("decode" if step else "prefill"):
                logits = model.module(
                    input_ids=column,
                    position_ids=position,
                    use_cache=True,
                    logits_to_keep=last_column(column),
                    **{cache_argument(model.module): cache},
                ).logits[:, -1]
            with watch.phase("sampling"):
                token = next_tokens(logits, sampling, draws[:, step])
                out.append(token.item())
            column, position = token[:, None], position[:, -1:] + 1
        with watch.phase("detokenise"):
            model.tokenizer.decode(out)
    return watch
