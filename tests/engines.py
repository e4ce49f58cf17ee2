"""Stand-ins for a model in the inference process: free, slow, or dying at a chosen request."""

import os
import time
from dataclasses import replace

from llmperf import models

# The byte tokenizer gives "!" the id 0, so these ids spell a text.
TEXT = [ord(c) - ord("!") for c in "all-cats-are-grey-in-the-dark."]


def null(config):
    """Costs nothing: token n of a request is the n-th letter of a text, over and over."""

    def decode(requests, sampling, stop):
        left = [r.max_new_tokens for r in requests]
        for step in range(max(left)):
            yield [TEXT[step % len(TEXT)] if step < n else None for n in left]

    return decode


def slow(config):
    """Ten milliseconds a step."""
    inner = null(config)

    def decode(requests, sampling, stop):
        for row in inner(requests, sampling, stop):
            time.sleep(0.01)
            yield row

    return decode


def mortal(config):
    """Ends the process at prompt (13,), fails the batch at (14,)."""
    inner = slow(config)

    def decode(requests, sampling, stop):
        first = {r.prompt_ids[0] for r in requests}
        for row in inner(requests, sampling, stop):
            if 13 in first:
                os._exit(7)
            if 14 in first:
                raise ValueError("this batch cannot be decoded")
            yield row

    return decode


def unable(config):
    raise MemoryError("the model does not fit")


def front(max_positions=512):
    """A Model without weights, for a Server with one of these engines."""
    shape = replace(models.shape_of("gpt2"), name="null", vocab=257, max_positions=max_positions)
    source = models.LoadSpec("null", "fp32", "cpu", "random")
    tokenizer = models.byte_tokenizer()
    return models.Model("null", None, tokenizer, shape, "fp32", "cpu", "random", None, 0.0, source)
