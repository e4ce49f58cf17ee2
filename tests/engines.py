"""Stand-ins for a model in the inference process: free, slow, or dying at a chosen request."""

import os
import time
from dataclasses import replace

from llmperf import models
from llmperf.strategies.inference import GroupedSlots

# The byte tokenizer gives "!" the id 0, so these ids spell a text.
TEXT = [ord(c) - ord("!") for c in "all-cats-are-grey-in-the-dark."]


def engine(decode):
    """What `inference` asks for: slots of this decoding loop, in groups or joining."""

    def slots(batching, rows, max_length, loop, processes, threads):
        kind = Joining if batching == "slots" else GroupedSlots
        return kind(decode, rows, loop)

    return slots


class Joining:
    """A stand-in for `decoding.Slots`: each request has a group of one, all step together."""

    def __init__(self, decode, rows, loop):
        self.loop, self.reason, self.sampling = loop, None, None
        self._decode, self._rows, self._groups = decode, rows, {}

    @property
    def free(self):
        return self._rows - len(self._groups)

    def admit(self, key, request):
        self._groups[key] = GroupedSlots(self._decode, 1)
        self._groups[key].admit(key, request)

    def drop(self, key):
        self._groups.pop(key, None)

    def step(self):
        found = [each for group in self._groups.values() for each in group.step()]
        for key, _, last in found:
            if last:
                self.drop(key)
        return found


def null(config):
    """Costs nothing: token n of a request is the n-th letter of a text, over and over."""
    return engine(letters)


def letters(requests, sampling):
    left = [r.max_new_tokens for r in requests]
    for step in range(max(left)):
        yield [TEXT[step % len(TEXT)] if step < n else None for n in left]


def slow(config):
    """Ten milliseconds a step."""
    return engine(slow_letters)


def slow_letters(requests, sampling):
    for row in letters(requests, sampling):
        time.sleep(0.01)
        yield row


def mortal(config):
    """Ends the process at prompt (13,), fails the batch at (14,)."""

    def decode(requests, sampling):
        first = {r.prompt_ids[0] for r in requests}
        for row in slow_letters(requests, sampling):
            if 13 in first:
                os._exit(7)
            if 14 in first:
                raise ValueError("this batch cannot be decoded")
            yield row

    return engine(decode)


def unable(config):
    raise MemoryError("the model does not fit")


def front(max_positions=512):
    """A Model without weights, for a Server with one of these engines."""
    shape = replace(models.shape_of("gpt2"), name="null", vocab=257, max_positions=max_positions)
    source = models.LoadSpec("null", "fp32", "cpu", "random")
    tokenizer = models.byte_tokenizer()
    return models.Model("null", None, tokenizer, shape, "fp32", "cpu", "random", None, 0.0, source)
