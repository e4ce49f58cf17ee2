"""One generation in phases: how long each keeps the processor, then waits for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from llmperf.decoding import last_column, pad, positions
from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import Sampling, next_tokens, uniforms
from llmperf.models import Model, with_cache

PHASES = ("tokenise", "prefill", "decode", "sampling", "detokenise")


class Stopwatch:
    """Milliseconds a phase: until the calls returned (processor), and from then until all queued
    work was done (waiting for the device). On the CPU the second is 0: calls return when done.
    """

    def __init__(self, device: str):
        self.device = device
        self.processor_ms, self.waiting_ms = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to the phase `name`."""
        began = time.perf_counter()
        yield
        returned = time.perf_counter()
        self.processor_ms[name] += (returned - began) * 1e3
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.waiting_ms[name] += (time.perf_counter() - returned) * 1e3


@torch.inference_mode()
def split(model: Model, text: str, new_tokens: int, sampling: Sampling, seed: int = 0) -> Stopwatch:
    """Generate `new_tokens` after `text` with the cached loop, each phase timed on its own.

    Waiting for the device after every phase makes the whole a little slower than the loop itself.
    """
    watch = Stopwatch(model.device)
    with watch.phase("tokenise"):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = pad([Request(0, tuple(ids), new_tokens, seed)], model.torch_device)
    draws = uniforms([seed], new_tokens).to(model.torch_device)
    cache = with_cache(model.module, DynamicCache(config=model.module.config))
    column, position, out = batch.ids, positions(batch.mask), []
    for step in range(new_tokens):
        with watch.phase("decode" if step else "prefill"):
            last = last_column(column)
            known = {"position_ids": position, "logits_to_keep": last}
            logits = model.module(input_ids=column, **known, **cache).logits[:, -1]
        with watch.phase("sampling"):
            token = next_tokens(logits, sampling, draws[:, step])
            out.append(token.item())
        column, position = token[:, None], position[:, -1:] + 1
    with watch.phase("detokenise"):
        model.tokenizer.decode(out)
    return watch
