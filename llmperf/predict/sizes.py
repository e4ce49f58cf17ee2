"""Bytes: what each parameter tensor, buffer and cache entry takes, to the byte, without torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from llmperf.models.quantize import GROUP, canonical
from llmperf.models.tensors import ModelShape, Tensor

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_QUANTIZED_KINDS = ("linear", "expert")  # embeddings, head, norms, biases and routers stay as is


@dataclass(frozen=True)
class Scheme:
    """A quantisation of the linear layers. `group` counts the inputs that share a scale."""

    method: str  # awq, gptq, bnb, int
    bits: int
    group: int


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises ValueError for a dtype that is not known."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def scheme(shape: ModelShape, quantization: str | None = None) -> Scheme | None:
    """The quantisation asked for, or else the one that the checkpoint declares.

    Words: those of `quantize.WORDS`; `awq` and `gptq` with bits and group size where they differ
    from 4 and 128, as in `gptq-8-g64`.
    """
    word = canonical(quantization) or shape.quantization
    if word in (None, "none"):
        return None
    if word in ("bnb-4", "bnb-8"):
        return Scheme("bnb", int(word[-1]), GROUP)
    if word in ("int8", "int4"):
        return Scheme("int", int(word[-1]), GROUP)
    match = re.fullmatch(r"(awq|gptq)(?:-([248]))?(?:-g(-?\d+))?", word)
    if not match:
        raise ValueError(
            f"unknown quantization {word!r}: choose none, int8, int4, bnb-8, bnb-4, awq or gptq "
            "(the last two also as gptq-8-g64)"
        )
    return Scheme(match[1], int(match[2] or 4), int(match[3] or 128))


def weights_bytes(shape: ModelShape, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all parameters as they lie in memory, scales and unquantised parts included."""
    return sum(size for _, size in stored(shape, dtype, quantization))


def stored(
    shape: ModelShape, dtype: str, quantization: str | None = None
) -> tuple[tuple[Tensor, int], ...]:
    """Each stored tensor as (parameter it belongs to, bytes), in the order of registration."""
    return _stored(shape, dtype_bytes(dtype), scheme(shape, quantization))


@lru_cache(maxsize=64)
def _stored(shape: ModelShape, item: int, how: Scheme | None) -> tuple[tuple[Tensor, int], ...]:
    return tuple(
        (tensor, size)
        for tensor in shape.tensors()
        for size in (
            _quantized(tensor, how, item)
            if how and tensor.kind in _QUANTIZED_KINDS
            else (tensor.numel * item,)
        )
    )


def _quantized(t: Tensor, how: Scheme, item: int) -> Iterator[int]:
    """Bytes of the tensors that replace one matrix of `rows` outputs and `columns` inputs."""
    if how.method == "int":  # int8: a scale a row; int4: scale and zero a group, padded to whole
        groups = ceil(t.columns / how.group)
        yield t.numel if how.bits == 8 else t.count * t.rows * groups * how.group // 2
        yield item * t.count * t.rows * (1 if how.bits == 8 else 2 * groups)
        return
    if how.method == "bnb" and how.bits == 8:  # int8 weights, one fp32 scale a row
        yield t.numel
        yield 4 * t.count * t.rows
        return
    yield t.numel * how.bits // 8
    if how.method == "bnb":  # one fp32 absmax a block of 64, and the table of 16 fp32 values
        yield 4 * ceil(t.numel / how.group)
        yield 4 * 16
        return
    groups = t.count * (ceil(t.columns / how.group) if how.group > 0 else 1)
    yield groups * t.rows * how.bits // 8  # zero points, packed like the weights
    yield groups * t.rows * 2  # scales, always fp16
    if how.method == "gptq":
        yield 4 * t.count * t.columns  # the group of each input, int32


def kv_bytes(shape: ModelShape, batch: int, length: int, dtype: str) -> int:
    """Bytes of the cache of `batch` rows, each padded to `length` tokens.

    A sliding layer holds min(window, length) tokens; MLA the latent and the shared rotary key
    (older releases of transformers kept them expanded). Raises ValueError for sizes below zero.
    """
    if batch < 0 or length < 0:
        raise ValueError(f"batch {batch} and length {length} must not be negative")
    per_token = shape.kv_elements_per_token * dtype_bytes(dtype) * batch
    return per_token * sum(min(w or length, length) for w in _layer_windows(shape))


def _layer_windows(shape: ModelShape) -> tuple[int | None, ...]:
    return shape.windows or (None,) * shape.layers


def buffers_bytes(shape: ModelShape, dtype: str, masks: bool = False) -> int:
    """Bytes of the module's buffers: see `buffers`."""
    return sum(buffers(shape, dtype, masks))


def buffers(shape: ModelShape, dtype: str, masks: bool = False) -> list[int]:
    """Bytes of each buffer: rotary frequencies (two fp32 copies), an embedding's scale.

    `masks` gives those of transformers 4 up to 4.37, the releases of the published study's time:
    for GPT-2 a boolean mask of positions x positions a layer and the value it masks with, for
    Llama a table of cosines and one of sines over all positions a layer, in the model's dtype.
    """
    rotary = shape.mla.rope_dim if shape.mla else shape.head_dim
    frequencies = rotary // 2 * 4
    if shape.learned_positions:
        return [shape.max_positions**2, 4] * shape.layers * masks
    if masks:
        table = shape.max_positions * rotary * dtype_bytes(dtype)
        return [frequencies, table, table] * shape.layers
    kinds = 2 if shape.family == "gemma3_text" else 1  # frequencies for each kind of layer
    found = [4] * shape.scaled_embedding + [frequencies] * 2 * kinds
    if shape.moe and shape.family == "deepseek_v3":  # the router's score correction
        found += [4 * shape.moe.experts] * (shape.layers - shape.moe.first_layer)
    return found
