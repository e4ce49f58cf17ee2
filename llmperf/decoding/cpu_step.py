"""A forward step on a CPU as one call into C: the model's description for C, and its buffers.

The parts of a model are found by the names that transformers gives its modules. A name that is
absent, or a model whose logits then differ from the eager ones, is `Unsupported`: such a model
runs `cached`.
"""

import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers.pytorch_utils import Conv1D

from llmperf.decoding.batch import Piece
from llmperf.decoding.cpu_library import Unsupported, ffi, library, processor
from llmperf.decoding.sampling import Sampling, next_tokens
from llmperf.machine.rates import seconds_of

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as in model.h
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3}
MOST_ROWS = 256  # tokens in one call; more are split
_pool = threading.Lock()  # one caller at a time works with several threads
_tables_lock = threading.Lock()


def _at(tensor: torch.Tensor):
    return ffi.cast("void *", tensor.data_ptr())


class CpuStep:
    """The step of one model: tokens of any slots and positions in, logits out.

    It reads the model's own weights; `extra_bytes` are copies: small vectors in fp32, the scales
    of 4-bit weights, and a Conv1D (GPT-2), which holds its weight transposed. Raises Unsupported.
    """

    def __init__(self, model):
        # a step is kept with its module (see `loops`), which must not keep that alive
        self.module = weakref.proxy(model.module)
        self.config = model.module.config.get_text_config()
        self.library = library()
        self.kept: list = []  # what the description points to
        self.extra_bytes = 0
        self.table_length = 0
        self.description = ffi.new("Model *", self._describe())

    def next_tokens(self, logits, sampling: Sampling, uniform) -> torch.Tensor:
        """As `sampling.next_tokens`, without torch's threads; falls back to torch above
        MOST_CANDIDATES.

        OpenMP's workers spin for some milliseconds after an operator, on cores that the next step
        needs: it then took twice as long.
        """
        top_k = 1 if sampling.greedy else sampling.top_k
        if top_k is None or top_k > self.library.MOST_CANDIDATES:
            return next_tokens(logits, sampling, uniform)
        suppressed = ffi.new("int32_t[]", sampling.suppress)
        counts = len(sampling.suppress), min(top_k, logits.shape[1])
        limits = sampling.temperature, sampling.top_p or 1.0
        how = ffi.new("Sampling *", (suppressed, *counts, *limits))
        tokens = torch.empty(len(logits), dtype=torch.int32)
        self.library.next_tokens(_at(logits), *logits.shape, how, _at(uniform), _at(tokens))
        return tokens

    def first_layer_seconds(
        self, rows: int, position: int, products: bool = True, repeats: int = 5
    ) -> list[float]:
        """Seconds of a step of `rows` tokens in which every layer reads the first one's weights.

        Where a cache holds one layer, this is what a step takes without reading weights from
        memory. The output layer is left out, and without `products` so are all matrix products.
        """
        self._enlarge_tables(position + 1)  # before the layer, which points to them, is copied
        layer = ffi.new("Layer *", self.layers[0])
        for matrix in () if products else (*layer.qkv, layer.out, *layer.up, layer.down):
            matrix.rows = 0
        layers = ffi.new("Layer[]", [layer[0]] * self.description.layer_count)
        alike = ffi.new("Model *", self.description[0])
        alike.layers = layers
        buffers = CpuRows(self, rows, position + 1)
        for tensor in (buffers.keys, buffers.values):
            tensor.zero_()  # maps the pages; uninitialised memory may hold slow denormals
        call = ([0] * rows, list(range(rows)), [position] * rows, [False] * rows, buffers)
        return seconds_of(lambda: self(*call, alike), lambda: None, repeats)

    def __call__(self, ids, slots, positions, wanted, buffers, description=None) -> torch.Tensor:
        """Run tokens through the model; lists of equal length, one entry a token.

        Gives the logits of the tokens that are `wanted`: (wanted, vocabulary), fp32. Keys and
        values are written to `buffers` (CpuRows) at each token's slot and position. `description`
        replaces the model's.
        """
        description, threads = description or self.description, torch.get_num_threads()
        _, slot_count, _, length, _ = buffers.keys.shape
        self._enlarge_tables(length)
        floats = self.library.scratch_floats(description, len(ids), length, threads)
        if buffers.scratch.numel() < floats:
            buffers.scratch = torch.zeros(floats)  # uninitialised memory may hold slow denormals
        numbers = torch.tensor([ids, slots, positions], dtype=torch.int32)  # (3, rows)
        asked = torch.tensor([i for i, want in enumerate(wanted) if want], dtype=torch.int32)
        logits = torch.empty(len(asked), description.vocabulary)
        tensors = (*numbers, asked, logits, buffers.keys, buffers.values, buffers.scratch)
        sizes = (len(ids), len(asked), slot_count, length, threads)
        step = ffi.new("Step *", (*map(_at, tensors), *sizes))
        with _pool if threads > 1 else nullcontext():
            failed = self.library.run_step(description, step)
        if failed:
            raise RuntimeError("the threads of the compiled step could not be started")
        return logits

    # The description: what is where in the module.

    def _describe(self) -> dict:
        """The fields of Model; `layers` last, since they need the sizes."""
        config, decoder = self.config, self.module.get_decoder()
        layers = _first(decoder, "layers", "h")
        heads, hidden = config.num_attention_heads, config.hidden_size
        d = {"hidden": hidden, "layer_count": len(layers), "heads": heads}
        d["kv_heads"] = getattr(config, "num_key_value_heads", None) or heads
        d["head_dim"] = getattr(config, "head_dim", None) or hidden // heads
        embedding = self.module.get_input_embeddings().weight
        if embedding.dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"it is in {embedding.dtype}: the step has fp32 and bf16")
        d["embedding"], d["dtype"] = _at(embedding), KINDS[embedding.dtype]
        multiplier = getattr(config, "embedding_multiplier", 1.0)
        d["embedding_scale"] = self._embedding_scale() * multiplier
        d["residual_scale"] = getattr(config, "residual_multiplier", 1.0)
        d["logit_scale"] = 1 / getattr(config, "logits_scaling", 1.0)
        d["attention_cap"] = getattr(config, "attn_logit_softcapping", None) or 0.0
        d["logit_cap"] = getattr(config, "final_logit_softcapping", None) or 0.0
        if (table := getattr(decoder, "wpe", None)) is not None:
            d["positions"] = _at(table.weight)
        final = _first(decoder, "norm", "ln_f", "final_layernorm")
        d["final_norm"], d["centred"] = self._norm(final), isinstance(final, torch.nn.LayerNorm)
        d["epsilon"] = _first(final, "eps", "variance_epsilon")
        d["head"] = self._matrix(self.module.get_output_embeddings())
        d["vocabulary"] = d["head"]["rows"]
        self.layers = ffi.new("Layer[]", [self._layer(d, i, x) for i, x in enumerate(layers)])
        return d | {"layers": self.layers}

    def _embedding_scale(self) -> float:
        """What the embedding module multiplies its rows by (Gemma: the root of their width)."""
        layer = self.module.get_input_embeddings()
        row = torch.ones(1, dtype=torch.long, device=layer.weight.device)
        ratio = layer(row)[0].float() / layer.weight[1].float()
        return ratio[ratio.isfinite()].median().item()

    def _layer(self, d: dict, place: int, layer) -> dict:
        """The fields of one Layer; sets those of Model that all layers share."""
        attention, feed = _first(layer, "self_attn", "attn"), _first(layer, "mlp", "feed_forward")
        found = {"attention_norm": self._norm(_first(layer, "input_layernorm", "ln_1"))}
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma 2 and 3
            found["after_attention"] = self._norm(layer.post_attention_layernorm)
            found["feed_norm"] = self._norm(layer.pre_feedforward_layernorm)
            found["after_feed"] = self._norm(layer.post_feedforward_layernorm)
        else:
            found["feed_norm"] = self._norm(_first(layer, "post_attention_layernorm", "ln_2"))
        for name, where in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            if (norm := getattr(attention, where, None)) is not None:
                if norm.weight.shape != (d["head_dim"],):
                    raise Unsupported("it normalises queries over all heads together")
                found[name] = self._norm(norm)
        joint = getattr(attention, "qkv_proj", None) or getattr(attention, "c_attn", None)
        qkv = [joint] if joint else [_first(attention, n) for n in ("q_proj", "k_proj", "v_proj")]
        found["qkv"] = list(map(self._matrix, qkv))
        found["out"] = self._matrix(_first(attention, "o_proj", "c_proj", "dense"))
        d["attention_scale"] = getattr(attention, "scaling", None) or d["head_dim"] ** -0.5
        joint = getattr(feed, "gate_up_proj", None)
        gated = [feed.gate_proj, feed.up_proj] if hasattr(feed, "gate_proj") else None
        up = [joint] if joint is not None else gated or [_first(feed, "c_fc", "fc1", "up_proj")]
        found["up"] = list(map(self._matrix, up))
        found["down"] = self._matrix(_first(feed, "down_proj", "c_proj", "fc2"))
        d["gated"], d["feed"] = bool(joint is not None or gated), found["down"]["columns"]
        if sum(m["rows"] for m in found["up"]) != d["feed"] * (1 + d["gated"]):
            raise Unsupported("its feed-forward network has another form")
        word = getattr(self.config, "hidden_activation", None) or _first(
            self.config, "hidden_act", "activation_function"
        )
        if word not in ACTIVATIONS:
            raise Unsupported(f"its activation is {word!r}")
        d["activation"] = ACTIVATIONS[word]
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None or "sliding" in kinds[place]:
            found["window"] = getattr(self.config, "sliding_window", None) or 0
        return found

    def _enlarge_tables(self, length: int) -> None:
        """Cosines and sines of all positions up to `length`, for each kind of layer once."""
        decoder, tables = self.module.get_decoder(), {}
        if length <= self.table_length or not hasattr(decoder, "rotary_emb"):
            return
        with _tables_lock:
            for at, layer in zip(self.layers, _first(decoder, "layers", "h"), strict=True):
                attention = _first(layer, "self_attn", "attn")
                kind = getattr(attention, "layer_type", None)
                kind = kind or getattr(layer, "attention_type", None)
                if kind not in tables:
                    tables[kind] = _rotary_tables(decoder.rotary_emb, length, kind)
                if getattr(attention, "use_rope", True):
                    at.cosine, at.sine = map(_at, tables[kind])
                    self.description.rotary = 2 * tables[kind][0].shape[1]
            self.kept.append(tables)  # the old ones too: another thread may be reading them
            self.table_length = max(length, self.table_length)

    def _norm(self, norm) -> dict:
        weight = norm.weight.detach().float()
        if "Gemma" in type(norm).__name__:  # it multiplies by 1 + weight
            weight = weight + 1
        return {"weight": self._copy(weight), "bias": self._copy(getattr(norm, "bias", None))}

    def _copy(self, tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32):
        """The address of a copy that is kept; null where there is no tensor."""
        if tensor is None:
            return ffi.NULL
        made = tensor.detach().to(dtype).contiguous().clone()
        self.kept.append(made)
        self.extra_bytes += made.nbytes
        return _at(made)

    def _matrix(self, linear) -> dict:
        weight = (linear.integers if hasattr(linear, "integers") else linear.weight).detach()
        scale = getattr(linear, "scale", None)
        quantised = weight.dtype in (torch.int8, torch.uint8)
        if weight.dtype not in KINDS or quantised != (scale is not None):
            raise Unsupported(f"its {type(linear).__name__} holds {weight.dtype}")
        (rows, columns), address, group, packed = weight.shape, _at(weight), 0, None
        if isinstance(linear, Conv1D):
            address, (columns, rows) = self._copy(weight.t(), weight.dtype), weight.shape
        elif not weight.is_contiguous():
            raise Unsupported("its weights are not contiguous")
        if weight.dtype == torch.uint8:  # int4, two in a byte; scales (groups, rows, 2)
            columns, group = linear.inputs, 2 * columns // scale.shape[0]
            if columns % group or group % 64 or rows % 64 or "AVX512" not in processor():
                raise Unsupported("its 4-bit weights are packed for another kind of step")
            packed = scale.unflatten(1, (-1, 64)).permute(1, 0, 3, 2)  # in the order of reading
            scale = None  # of a whole row
        small = {"bias": self._copy(getattr(linear, "bias", None)), "scale": self._copy(scale)}
        small["groups"] = self._copy(packed, torch.bfloat16)
        sizes = {"rows": rows, "columns": columns, "kind": KINDS[weight.dtype], "group": group}
        return {"weight": address, **small, **sizes}


def _first(owner, *names: str):
    """The first of these attributes; Unsupported when there is none."""
    for name in names:
        if (found := getattr(owner, name, None)) is not None:
            return found
    raise Unsupported(f"its {type(owner).__name__} has no {' or '.join(names)}")


def _rotary_tables(rotary, length: int, kind: str | None) -> list[torch.Tensor]:
    """Cosine and sine, each (length, half of what is rotated)."""
    like, position = torch.empty(1, dtype=torch.float32), torch.arange(length)[None]
    try:
        tables = rotary(like, position)
    except (TypeError, AttributeError):  # several kinds of layers (Gemma 3)
        tables = rotary(like, position, layer_type=kind)
    half = tables[0].shape[-1] // 2
    return [t[0, :, :half].float().contiguous() for t in tables]


class CpuRows:
    """Slots of up to `length` tokens; every token of every piece is a row of the step.

    `keys` and `values`: (layers, slots, kv_heads, length, head_dim), in the model's dtype; their
    memory is taken page by page as tokens are written. `scratch` grows with the rows of a call and
    the threads that torch has.
    """

    def __init__(self, step: CpuStep, slots: int, length: int):
        self._step, d = step, step.description
        shape = (d.layer_count, slots, d.kv_heads, length, d.head_dim)
        dtype = step.module.get_input_embeddings().weight.dtype
        self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.scratch = torch.empty(0)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits (pieces with `last`, vocabulary); at most MOST_ROWS tokens in one call."""
        rows = [
            (id, piece.slot, place, piece.last and place == piece.end - 1)
            for piece in pieces
            for place, id in enumerate(piece.ids, piece.start)
        ]
        found = []
        for at in range(0, len(rows), MOST_ROWS):
            found.append(self._step(*zip(*rows[at : at + MOST_ROWS], strict=True), self))
        return found[0] if len(found) == 1 else torch.cat(found)
