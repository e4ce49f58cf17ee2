"""Fewer bits a weight, as words and bytes, without torch: see `quantize` for the layers.

Only the matrices of linear layers are quantised. `int8` and `int4` run on torch's own kernels and
keep the output layer in int8, as a tensor of its own where it was tied to the embedding; `bnb-8`
and `bnb-4` run on bitsandbytes, a checkpoint in `awq` or `gptq` on gptqmodel, and leave that layer
as it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from llmperf.models.shape import ModelShape, Tensor

OURS, BNB, CHECKPOINT = ("int8", "int4"), ("bnb-8", "bnb-4"), ("awq", "gptq")
QUANTIZATIONS = ("none", *OURS, *BNB, *CHECKPOINT)
CONVERSIONS = (None, "none", *OURS, *BNB)  # of weights that are not quantised yet
GROUP = 64  # inputs that share a scale, in int4 and bnb-4
NESTED = 256  # scales of bnb-4 that share a scale, with double quantisation
# method → bits and group, where a word does not say them; of fp8 the group is the side of a block
DEFAULTS = {"int": (8, GROUP), "bnb": (4, GROUP), "awq": (4, 128), "gptq": (4, 128), "fp8": (8, 0),
            "mxfp4": (4, 32)}  # fmt: skip
WORD = re.compile(r"(int|bnb|awq|gptq|fp8|mxfp4)-?([248])?(?:-[gb](-?\d+))?(-double)?")


@dataclass(frozen=True)
class Scheme:
    """A quantisation. `group` counts the inputs that share a scale."""

    method: str
    bits: int
    group: int
    double: bool = False  # the scales are quantised as well (bnb-4)


def scheme(word: str | None) -> Scheme | None:
    """The quantisation of a word; None for `none` and None. ValueError for an unknown one.

    Words: `QUANTIZATIONS`, `mxfp4`, and with sizes `gptq-8-g64`, `bnb-4-double`, `fp8-b128`.
    """
    if word in (None, "none"):
        return None
    match = WORD.fullmatch(word)
    if not match:
        raise ValueError(
            f"unknown quantization {word!r}: leave it None, or choose {', '.join(QUANTIZATIONS)} "
            "(the last two also as gptq-8-g64)"
        )
    bits, group = DEFAULTS[match[1]]
    return Scheme(match[1], int(match[2] or bits), int(match[3] or group), bool(match[4]))


def converted(shape: ModelShape, t: Tensor, how: Scheme) -> bool:
    """Whether a scheme converts this tensor of the model."""
    if how.method != "int" and any(k in t.name for k in shape.unquantized if "*" not in k):
        return False
    if how.method in ("fp8", "mxfp4") and t.role == "expert":
        return t.columns > 1
    if t.role == "head":
        return how.method == "int" and t.columns > 1  # not its bias
    return t.linear and how.method != "mxfp4"


def stored(t: Tensor, how: Scheme, item: int) -> Iterator[int]:
    """Bytes of the tensors that replace one matrix of `rows` outputs and `columns` inputs."""
    groups = ceil(t.columns / how.group) if how.group > 0 else 1
    if how.method == "int":  # int8: a scale a row; int4: scale and zero a group, padded to whole
        eight = how.bits == 8 or t.role == "head"
        yield t.numel if eight else t.rows * groups * how.group // 2
        yield item * t.rows * (1 if eight else 2 * groups)
        return
    yield t.numel * how.bits // 8
    if how.method == "bnb" and how.bits == 8:  # one fp32 scale a row
        yield 4 * t.rows
    elif how.method == "bnb":  # an absmax a block of 64, and the table of 16 fp32 values
        blocks = ceil(t.numel / how.group)
        yield blocks if how.double else 4 * blocks
        yield 4 * 16
        if how.double:  # the absmax in int8, with its own absmax, table of 256, and offset
            yield from (4 * ceil(blocks / NESTED), 4 * 256, 4)
    elif how.method == "fp8":  # one fp32 scale a square block, or one for all
        yield 4 * t.count * (groups * ceil(t.rows / how.group) if how.group else 1)
    elif how.method == "mxfp4":  # one 8-bit exponent for 32 inputs
        yield t.numel // how.group
    else:
        yield groups * t.rows * how.bits // 8  # zero points, packed like the weights
        yield groups * t.rows * 2  # scales, always fp16
        if how.method == "gptq":
            yield 4 * t.columns  # the group of each input, int32


def check(word: str | None, dtype: str, device: str) -> None:
    """Raise ValueError for a word that is unknown or cannot run in `dtype` on `device`."""
    scheme(word)
    if word in OURS and device != "cpu":
        raise ValueError(f"{word} runs on CPUs only here: use {BNB[OURS.index(word)]} on a GPU")
    if word == "int4" and dtype != "bf16":
        raise ValueError(f"int4 computes in bf16, and dtype is {dtype}: use dtype bf16")


def word_of_random(word: str | None, declared: str | None) -> str | None:
    """What to convert random weights to: `word`, or bnb-4 if it is None and `declared` is not."""
    if word not in CONVERSIONS:
        raise ValueError(f"random weights cannot be in {word}: choose {', '.join(CONVERSIONS[1:])}")
    return word or ("bnb-4" if declared else None)


def word_of_checkpoint(word: str | None, declared: str | None) -> str | None:
    """The quantisation of loaded weights: what the checkpoint declares, else the word asked for.

    Raises ValueError for a word that the checkpoint does not declare: `gptq` and `gptq-8` agree
    with `gptq-8-g32`, `gptq-4` does not.
    """
    if declared is None:
        if word not in CONVERSIONS:
            raise ValueError(f"these weights are not quantised by {word}: leave quantization None")
        return None if word == "none" else word
    if word and not declared.startswith(word):
        raise ValueError(f"these weights are quantised by {declared}: leave quantization None")
    return declared
