"""Bytes: what each parameter tensor, buffer and cache entry takes, to the byte, without torch."""

from dataclasses import replace
from functools import lru_cache

from llmperf.machine import DTYPE_BYTES
from llmperf.models import ModelShape, Tensor, converted, scheme, stored


def dtype_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


@lru_cache(maxsize=64)
def tensors(
    shape: ModelShape, dtype: str, quantization: str | None = None
) -> tuple[tuple[Tensor, int], ...]:
    """Each stored tensor as (parameter it belongs to, bytes), in the order of registration."""
    item, how = dtype_bytes(dtype), scheme(quantization or shape.quantization)
    found = []
    for t in shape.tensors:
        element = t.item_bytes or item
        if how and converted(shape, t, how):
            found += [(t, size) for size in stored(t, how, element)]
        else:
            found.append((t, t.numel * element))
    if how and how.method == "int" and shape.tied_embeddings:  # now a tensor of its own
        tied = (t for t in shape.tensors if t.role in ("embedding", "head") and t.columns > 1)
        head = replace(next(tied), role="head")
        found += [(head, size) for size in stored(head, how, item)]
    return tuple(found)


def weights_bytes(shape: ModelShape, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all parameters as they lie in memory, scales and unquantised tensors included."""
    return sum(size for _, size in tensors(shape, dtype, quantization))


@lru_cache(maxsize=64)
def weights_read(
    shape: ModelShape, dtype: str, quantization: str | None = None, tokens: int = 1
) -> float:
    """Bytes of parameters that one forward pass of `tokens` tokens reads.

    An embedding is looked up, not read through, unless it is the output layer too; of a mixture of
    experts as many are read as that many tokens hit, if each chooses at random.
    """
    hit = 1.0
    if shape.experts:
        hit = 1 - (1 - shape.experts_per_token / shape.experts) ** tokens
    every = tensors(shape, dtype, quantization)
    looked_up = {"position", "tower"}
    if any(t.role == "head" and t.columns > 1 for t, _ in every):
        looked_up.add("embedding")
    read = ((t, size) for t, size in every if t.role not in looked_up)
    return float(sum(size * (hit if t.role == "expert" else 1) for t, size in read))


def kv_bytes(shape: ModelShape, rows: int, length: int, dtype: str) -> int:
    """Bytes of the cache of `rows` rows, each padded to `length` tokens."""
    item = dtype_bytes(dtype)
    if not rows or not length:
        return 0
    return sum(
        rows * min(c.window or length, length) * (c.token_elements * item + c.token_bytes)
        + rows * (c.row_elements * item + c.row_bytes)
        + c.fixed_bytes
        for c in shape.cache
    )


def token_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes that all layers' caches grow by with one token of one row, before any window ends."""
    item = dtype_bytes(dtype)
    return sum(c.token_elements * item + c.token_bytes for c in shape.cache)


def buffers(shape: ModelShape, dtype: str, masks: bool = False) -> list[int]:
    """Bytes of each buffer of the module, such as rotary frequencies.

    `masks` gives those of transformers 4 up to 4.37, the releases of the published study's time: a
    mask a layer for GPT-2, tables of cosines and sines over all positions a layer for Llama.
    """
    item = dtype_bytes(dtype)
    if not masks:
        return [count * (size or item) for count, size in shape.buffers]
    if any(t.role == "position" for t in shape.tensors):  # learned ones
        return [shape.max_positions**2, 4] * shape.layers
    table = shape.max_positions * shape.head_dim * item
    return [shape.head_dim // 2 * 4, table, table] * shape.layers
