"""A forward step on a CPU as one call into C: the model described, the library built and loaded.

The parts of a model are found by the names that transformers gives its modules. A name that is
absent, or a model whose logits then differ from the eager ones, is `Unsupported`: such a model
runs `cached`.
"""

import threading
import time
import weakref
from contextlib import nullcontext

import torch
from transformers.pytorch_utils import Conv1D

from llmperf.decoding.cpu_library import Unsupported, ffi, library, processor
from llmperf.decoding.sampling import Sampling, next_tokens

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as in model.h
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3}
MOST_ROWS = 256  # tokens in one call; more are split
_pool = threading.Lock()  # one caller at a time works with several threads
_tables_lock = threading.Lock()


def _at(tensor: torch.Tensor, form: str = "void *"):
    return ffi.cast(form, tensor.data_ptr())


class CpuStep:
    """The step of one model: tokens of any slots and positions in, logits out.

    It reads the model's own weights; `extra_bytes` are copies: small vectors in fp32, and a Conv1D
    (GPT-2), which holds its weight transposed. Raises Unsupported.
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

    def new_cache(self, slots: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values: (layers, slots, kv_heads, length, head_dim), in the model's dtype.

        Memory is taken page by page as tokens are written.
        """
        d = self.description
        shape = (d.layer_count, slots, d.kv_heads, length, d.head_dim)
        dtype = self.module.get_input_embeddings().weight.dtype
        return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def scratch(self, rows: int, length: int) -> torch.Tensor:
        """Working memory for calls of up to `rows` tokens, with the threads that torch has now."""
        return torch.empty(self._scratch_floats(rows, length), dtype=torch.float32)

    def _scratch_floats(self, rows: int, length: int) -> int:
        threads = torch.get_num_threads()
        return self.library.scratch_floats(self.description, rows, length, threads)

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
        how = {"suppressed": suppressed, "suppressed_count": len(sampling.suppress)}
        how |= {"top_k": min(top_k, logits.shape[1]), "top_p": sampling.top_p or 1.0}
        how = ffi.new("Sampling *", how | {"temperature": sampling.temperature})
        tokens = torch.empty(len(logits), dtype=torch.int32)
        self.library.next_tokens(
            *[_at(logits, "float *"), *logits.shape, how],
            *[_at(uniform, "double *"), _at(tokens, "int32_t *")],
        )
        return tokens

    def first_layer_seconds(
        self, rows: int, position: int, products: bool = True, repeats: int = 5
    ) -> list[float]:
        """Seconds of a step of `rows` tokens in which every layer reads the first one's weights.

        Where a cache holds one layer, this is what a step takes without reading weights from
        memory. The output layer is left out, and without `products` so are all matrix products.
        """
        self._tables(position + 1)  # before the layer, which points to them, is copied
        layer = ffi.new("Layer *", self.layers[0])
        for matrix in () if products else (*layer.qkv, layer.out, *layer.up, layer.down):
            matrix.rows = 0
        layers = ffi.new("Layer[]", [layer[0]] * self.description.layer_count)
        alike = ffi.new("Model *", self.description[0])
        alike.layers = layers
        cache, scratch = self.new_cache(rows, position + 1), self.scratch(rows, position + 1)
        for tensor in (*cache, scratch):
            tensor.zero_()  # fetches the memory; arithmetic on what lies there could be slow
        call = ([0] * rows, list(range(rows)), [position] * rows, [], cache, scratch)
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self(*call, alike)
            seconds.append(time.perf_counter() - start)
        return seconds[1:]  # the first one fetches the layer

    def __call__(
        self, ids, slots, positions, wanted, cache, scratch, description=None
    ) -> torch.Tensor:
        """Run tokens through the model; lists of equal length, one entry a token.

        `wanted` are the indices of the tokens whose logits are asked for: → (wanted, vocabulary),
        fp32. Keys and values are written to `cache` at each token's slot and position.
        `description`: of another model than its own.
        """
        (keys, values), description = cache, description or self.description
        self._tables(keys.shape[3])
        if scratch.numel() < self._scratch_floats(len(ids), keys.shape[3]):
            scratch = self.scratch(len(ids), keys.shape[3])  # there are more threads than then
        numbers = torch.tensor([ids, slots, positions], dtype=torch.int32)  # (3, rows)
        asked = torch.tensor(wanted, dtype=torch.int32)
        logits, threads = torch.empty(len(wanted), description.vocabulary), torch.get_num_threads()
        whole = [_at(t, "int32_t *") for t in (*numbers, asked)]
        sizes = (len(ids), len(wanted), keys.shape[1], keys.shape[3], threads)
        step = (*whole, _at(logits, "float *"), _at(keys), _at(values), _at(scratch, "float *"))
        with _pool if threads > 1 else nullcontext():
            failed = self.library.run_step(description, ffi.new("Step *", (*step, *sizes)))
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
        d["attention_scale"] = _first(attention, "scaling", default=d["head_dim"] ** -0.5)
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

    def _tables(self, length: int) -> None:
        """Cosines and sines of all positions up to `length`, for each kind of layer once."""
        decoder = self.module.get_decoder()
        if length <= self.table_length or not hasattr(decoder, "rotary_emb"):
            return
        with _tables_lock:
            self._make_tables(decoder, length)

    def _make_tables(self, decoder, length: int) -> None:
        like = torch.empty(1, dtype=torch.float32)
        position = torch.arange(length)[None]
        tables: dict = {}
        for place, layer in enumerate(_first(decoder, "layers", "h")):
            kind = getattr(_first(layer, "self_attn", "attn"), "layer_type", None)
            kind = kind or getattr(layer, "attention_type", None)
            if kind not in tables:
                tables[kind] = self._table(decoder.rotary_emb, like, position, kind)
            cosine, sine = tables[kind]
            if not getattr(_first(layer, "self_attn", "attn"), "use_rope", True):
                continue
            at = self.layers[place]
            at.cosine, at.sine = _at(cosine, "float *"), _at(sine, "float *")
            self.description.rotary = 2 * cosine.shape[1]
        self.kept.append(tables)  # the old ones too: another thread may be reading them
        self.table_length = max(length, self.table_length)

    @staticmethod
    def _table(rotary, like, position, kind) -> list[torch.Tensor]:
        try:
            tables = rotary(like, position)
        except (TypeError, AttributeError):  # several kinds of layers (Gemma 3)
            tables = rotary(like, position, layer_type=kind)
        half = tables[0].shape[-1] // 2
        return [t[0, :, :half].float().contiguous() for t in tables]

    def _norm(self, norm) -> dict:
        weight = norm.weight.detach().float()
        if "Gemma" in type(norm).__name__:  # it multiplies by 1 + weight
            weight = weight + 1
        bias = getattr(norm, "bias", None)
        return {"weight": self._floats(weight)} | (
            {} if bias is None else {"bias": self._floats(bias)}
        )

    def _floats(self, tensor):
        return ffi.cast("float *", self._copy(tensor, torch.float32))

    def _copy(self, tensor, dtype):
        made = tensor.detach().to(dtype).contiguous().clone()
        self.kept.append(made)
        self.extra_bytes += made.nbytes
        return _at(made)

    def _matrix(self, linear) -> dict:
        weight, scale = linear.weight.detach(), getattr(linear, "scale", None)
        quantised = weight.dtype in (torch.int8, torch.uint8)
        if weight.dtype not in KINDS or quantised != (scale is not None):
            raise Unsupported(f"its {type(linear).__name__} holds {weight.dtype}")
        (rows, columns), address, group = weight.shape, _at(weight), 0
        if isinstance(linear, Conv1D):
            address, (columns, rows) = self._copy(weight.t(), weight.dtype), weight.shape
        elif not weight.is_contiguous():
            raise Unsupported("its weights are not contiguous")
        if weight.dtype == torch.uint8:  # int4, two in a byte; scales (groups, rows, 2)
            columns, group = linear.inputs, 2 * columns // scale.shape[0]
            if columns % group or group % 64 or rows % 64 or "AVX512" not in processor():
                raise Unsupported("its 4-bit weights are packed for another kind of step")
            scale = scale.transpose(1, 2)
        small = {"bias": getattr(linear, "bias", None), "scale": scale}
        small = {name: self._floats(t) for name, t in small.items() if t is not None}
        sizes = {"rows": rows, "columns": columns, "kind": KINDS[weight.dtype], "group": group}
        return {"weight": address, **small, **sizes}


def _first(owner, *names: str, default=None):
    """The first of these attributes; Unsupported when there is none."""
    for name in names:
        if (found := getattr(owner, name, None)) is not None:
            return found
    if default is not None:
        return default
    raise Unsupported(f"its {type(owner).__name__} has no {' or '.join(names)}")
