"""A decoder as plain data: its tensors, buffers, cache and arithmetic, without torch."""

import json
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor of a module.

    `role`: embedding, position, head, attention, feed-forward, expert, router, norm, other, and
    tower for what only images or sound pass.
    A matrix is (rows, columns) = (out, in); an expert stack has `count` of them. `linear` marks
    the weight of a linear layer other than the output layer. `item_bytes` is 0 where the
    tensor has the model's dtype.
    """

    name: str
    role: str
    layer: int | None
    rows: int
    columns: int = 1
    count: int = 1
    linear: bool = False
    item_bytes: int = 0

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class CacheLayer:
    """What one layer caches: elements have the model's dtype, bytes have another one.

    `token_*` grow with the tokens of a row up to `window`, `row_*` do not (states of linear
    attention), `fixed_bytes` are there once whatever the batch.
    """

    token_elements: int
    token_bytes: int
    row_elements: int
    row_bytes: int
    fixed_bytes: int
    window: int | None


@dataclass(frozen=True)
class ModelShape:
    """All that decides a decoder's bytes and arithmetic. Sizes are counts of elements.

    `token_flops` are the FLOPs of one token in all layers, attention and head left out;
    `pair_flops` those of one query that attends to one key in all layers; `past_flops` those that
    each cached token costs again in every step (latent attention expands it). `quantization` is
    what the checkpoint declares. `buffers` are (elements, bytes an element; 0: the model's dtype).
    """

    name: str
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    token_flops: float
    pair_flops: float
    past_flops: float
    tensors: tuple[Tensor, ...] = field(hash=False, repr=False)
    buffers: tuple[tuple[int, int], ...] = field(hash=False, repr=False)
    cache: tuple[CacheLayer, ...] = field(hash=False, repr=False)
    quantization: str | None = None
    unquantized: tuple[str, ...] = ()  # modules that the checkpoint leaves as they are

    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window in tokens of each layer that attends to cached tokens, or None."""
        return tuple(c.window for c in self.cache if c.token_elements or c.token_bytes)

    @property
    def latent(self) -> bool:
        """Whether the cache holds latents that each step expands (DeepSeek, arXiv:2405.04434)."""
        return self.past_flops > 0

    @property
    def step_copies(self) -> int:
        """Elements of a cached token that a step holds twice. DynamicCache appends by concatenating
        keys, then values: one of them in one layer. Latent attention expands both of all tokens."""
        if self.latent:
            return max(first for first, _ in self.widths("attention"))
        return self.kv_heads * self.head_dim

    def widths(self, *roles: str) -> set[tuple[int, int]]:
        """For each block of these roles: (outputs of its linear layers but the last, added up;
        inputs of the last). Layers of experts count once per expert that a token uses."""
        blocks: dict[tuple, list[Tensor]] = {}
        for t in self.tensors:
            if t.role in roles and (t.linear or t.role == "expert") and t.columns > 1:
                blocks.setdefault((t.layer, t.role), []).append(t)
        found = set()
        for block in blocks.values():
            each = self.experts_per_token if block[0].role == "expert" else 1
            first = block[:2] if each > 1 and block[0].count == 1 else block[:-1]
            found.add((each * sum(t.rows for t in first), each * block[-1].columns))
        return found


def from_json(text: str) -> ModelShape:
    """The shape from `json.dumps(asdict(shape))`."""
    plain = json.loads(text)
    return ModelShape(
        **plain
        | {
            "tensors": tuple(Tensor(**row) for row in plain["tensors"]),
            "cache": tuple(CacheLayer(**row) for row in plain["cache"]),
            "buffers": tuple(map(tuple, plain["buffers"])),
            "unquantized": tuple(plain["unquantized"]),
        }
    )
