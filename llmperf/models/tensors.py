"""What a decoder is made of: its parameter tensors, listed from its dimensions without torch.

Which tensors a family has, and in which order, follows transformers 5 (`modeling_*.py`).
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): widths of the projections."""

    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class MoE:
    """Mixture of experts in the MLP of every layer from `first_layer` on."""

    experts: int
    shared: int
    per_token: int
    intermediate: int
    first_layer: int


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor. `kind`: embedding, position, linear, expert, router, norm, bias, head.

    Matrices are (rows, columns) = (out, in); an expert stack has `count` of them.
    """

    name: str
    kind: str
    rows: int
    columns: int = 1
    count: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class ModelShape:
    """All that decides a decoder's parameters, cache and arithmetic. Sizes are counts of elements.

    `windows` has one entry a layer, the sliding window in tokens or None for full attention;
    empty means full attention everywhere. `quantization` is what the checkpoint itself declares.
    """

    name: str
    family: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied_embeddings: bool
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    gated_mlp: bool = True
    learned_positions: bool = False
    scaled_embedding: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    mla: MLA | None = None
    moe: MoE | None = None
    quantization: str | None = None
    hub_id: str | None = None

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, or None."""
        return self.windows[layer] if self.windows else None

    def tensors(self) -> tuple[Tensor, ...]:
        """Every parameter tensor, in the order in which the module registers them."""
        return _tensors(self)

    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(t.numel for t in self.tensors())

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one layer's cache keeps per token; MLA keeps the shared latent only."""
        if self.mla:
            return self.mla.kv_rank + self.mla.rope_dim
        return 2 * self.kv_heads * self.head_dim


@lru_cache(maxsize=64)
def _tensors(shape: ModelShape) -> tuple[Tensor, ...]:
    found = [Tensor("embedding", "embedding", shape.vocab, shape.hidden)]
    if shape.learned_positions:
        found.append(Tensor("positions", "position", shape.max_positions, shape.hidden))
    norms = _norm(shape, "norm", shape.hidden) * shape.norms_per_layer
    attention = _attention(shape)
    for layer in range(shape.layers):
        found += [
            Tensor(f"layers.{layer}.{t.name}", t.kind, t.rows, t.columns, t.count)
            for t in (*attention, *_mlp(shape, layer), *norms)
        ]
    found += _norm(shape, "norm", shape.hidden)
    if not shape.tied_embeddings:
        found.append(Tensor("head", "head", shape.vocab, shape.hidden))
    return tuple(found)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> list[Tensor]:
    return [Tensor(name, "linear", rows, columns)] + bias * [Tensor(f"{name}.bias", "bias", rows)]


def _norm(shape: ModelShape, name: str, width: int) -> list[Tensor]:
    return [Tensor(name, "norm", width)] + shape.norm_bias * [Tensor(f"{name}.bias", "bias", width)]


def _attention(s: ModelShape) -> list[Tensor]:
    if s.mla:
        return _latent_attention(s, s.mla)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    out = _linear("o", s.hidden, q, s.out_bias)
    if s.family == "gpt2":  # one fused matrix for q, k and v
        return _linear("qkv", q + 2 * kv, s.hidden, s.qkv_bias) + out
    norms = [Tensor(n, "norm", s.head_dim) for n in ("q_norm", "k_norm") if s.qk_norm]
    widths = {"q": q, "k": kv, "v": kv}
    qkv = [t for n, rows in widths.items() for t in _linear(n, rows, s.hidden, s.qkv_bias)]
    return qkv + out + norms


def _latent_attention(s: ModelShape, m: MLA) -> list[Tensor]:
    q = s.heads * (m.nope_dim + m.rope_dim)
    found = []
    if m.q_rank is None:
        found += _linear("q", q, s.hidden)
    else:
        found += _linear("q_a", m.q_rank, s.hidden, s.qkv_bias)
        found += [Tensor("q_a_norm", "norm", m.q_rank), *_linear("q_b", q, m.q_rank)]
    found += _linear("kv_a", m.kv_rank + m.rope_dim, s.hidden, s.qkv_bias)
    found += [Tensor("kv_a_norm", "norm", m.kv_rank)]
    found += _linear("kv_b", s.heads * (m.nope_dim + m.value_dim), m.kv_rank)
    return found + _linear("o", s.hidden, s.heads * m.value_dim, s.out_bias)


def _mlp(s: ModelShape, layer: int) -> list[Tensor]:
    if s.moe is None or layer < s.moe.first_layer:
        return _feed_forward(s, "mlp", s.intermediate)
    m = s.moe
    return [
        Tensor("experts.gate_up", "expert", 2 * m.intermediate, s.hidden, m.experts),
        Tensor("experts.down", "expert", s.hidden, m.intermediate, m.experts),
        Tensor("router", "router", m.experts, s.hidden),
        *_feed_forward(s, "shared", m.intermediate * m.shared),
    ]


def _feed_forward(s: ModelShape, name: str, width: int) -> list[Tensor]:
    ups = ("gate", "up") if s.gated_mlp else ("up",)
    found = [t for up in ups for t in _linear(f"{name}.{up}", width, s.hidden, s.mlp_bias)]
    return found + _linear(f"{name}.down", s.hidden, width, s.mlp_bias)
