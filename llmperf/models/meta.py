"""Read a decoder's shape from the module itself, built on torch's meta device without memory.

Three short forward passes without data show what its cache holds and count the FLOPs.
"""

import functools
import inspect
import re
import warnings
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Cache, DynamicCache, initialization
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from llmperf.machine import first_line
from llmperf.models.shape import CacheLayer, ModelShape, Tensor

ROWS = 3  # of the passes; a dimension of the cache that is this long is the batch
PASS_DTYPE = torch.bfloat16  # tensors that have it after the passes follow the model's dtype
ROLES = (  # of a parameter by its path in the module; the first that is found
    ("router", r"router|shared_expert_gate|(^|\.)gate$"),
    ("expert", r"(^|\.)experts(\.|$)"),
    ("norm", r"norm|(^|\.)ln_|layernorm"),
    ("attention", r"attn|attention"),
    ("feed-forward", r"mlp|ffn|feed_forward|shared_expert|moe|(^|\.)fc\d|dense|c_fc|block_sparse"),
)
# What the cache is called; the last by Mamba in transformers 5.17.
CACHES = ("cache", "past_key_values", "cache_params")
POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")


def read(config) -> ModelShape:
    """The shape of a transformers configuration (without its quantization_config).

    Raises ValueError, in one sentence, for what is no decoder of transformers.
    """
    logging.set_verbosity_error()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder: use a decoder-only model")
    try:
        return _shape(config)
    except Exception as error:  # what a strange configuration raises is of any kind
        raise ValueError(
            f"transformers cannot build and run a decoder of type {config.model_type!r}"
            f" ({first_line(error)}): use a decoder-only model with a complete configuration"
        ) from error


def _shape(config) -> ModelShape:
    module = _module_of(config)
    cache, (kv_heads, head_dim), flops = _passes(module, config)
    text, output = config.get_text_config(decoder=True), module.get_output_embeddings()
    tensors = tuple(_tensors(module, text.hidden_size))
    head = 2 * output.weight.numel()
    token, pair, past = _split(flops, any(c.row_elements + c.row_bytes for c in cache))
    experts, per_token = _experts(tensors, token - head)
    positions = (getattr(text, key, None) for key in POSITIONS)
    return ModelShape(
        name=config.model_type,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        max_positions=next((n for n in positions if isinstance(n, int)), 1 << 20),
        tied_embeddings=output.weight is module.get_input_embeddings().weight,
        experts=experts,
        experts_per_token=per_token,
        token_flops=token - head,
        pair_flops=pair,
        past_flops=past,
        tensors=tensors,
        buffers=tuple((b.numel(), _item_bytes(module, n, b)) for n, b in module.named_buffers()),
        cache=cache,
    )


def _module_of(config):
    with torch.device("meta"), initialization.no_init_weights():
        module = AutoModelForCausalLM.from_config(
            config, dtype=PASS_DTYPE, experts_implementation="batched_mm"
        )
    for part in (config, config.get_text_config(decoder=True)):
        vars(part)["pad_token_id"] = None  # else some look for padding in data that is not there
    module.tie_weights()  # the meta device skips it with the initialisation
    return module.eval()


def with_cache(module, cache) -> dict:
    """The arguments that hand a cache to the forward pass, by the name that it has there.

    Raises ValueError for a model that takes none.
    """
    return {_cache_argument(type(module)): cache, "use_cache": True}


@functools.cache
def _cache_argument(kind: type) -> str:
    known = inspect.signature(kind.forward).parameters
    found = next((n for n in CACHES if n in known), None)
    if found is None:
        raise ValueError(f"{kind.__name__} takes no cache of keys and values: use loop recompute")
    return found


def _tensors(module, hidden: int) -> Iterator[Tensor]:
    head, inputs = module.get_output_embeddings(), module.get_input_embeddings()
    owners = dict(module.named_modules())
    decoder = {id(p) for p in (*module.get_decoder().parameters(), *head.parameters())}
    for name, p in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner, size = owners[path], list(p.shape) or [1]
        role = next((r for r, pattern in ROLES if re.search(pattern, path, re.I)), "other")
        if id(p) not in decoder:
            role = "tower"
        elif owner is head:
            role = "head"
        elif isinstance(owner, torch.nn.Embedding):
            learned = owner is not inputs and re.search(r"pos|wpe", path)
            role = "position" if learned else "embedding"
        linear = is_linear(owner) and leaf == "weight"
        count, (rows, columns) = 1, (size[0], p.numel() // size[0])
        if len(size) == 3 and role == "expert":
            count, rows, columns = size
            if (rows if "down" in leaf else columns) != hidden:
                rows, columns = columns, rows  # gpt-oss holds (experts, in, out)
        elif isinstance(owner, Conv1D) and len(size) == 2:
            rows, columns = columns, rows  # it holds (in, out)
        layer = re.search(r"\.(\d+)\.", name)
        index, item = int(layer[1]) if layer else None, _item_bytes(module, name, p)
        yield Tensor(name, role, index, rows, columns, count, linear and role != "head", item)


def is_linear(module) -> bool:
    """Whether a quantised layer can take its place: a router returns more than a product."""
    return isinstance(module, torch.nn.Linear | Conv1D) and "Router" not in type(module).__name__


def _item_bytes(module, name: str, tensor: torch.Tensor) -> int:
    """Bytes of an element; 0 where it has the model's dtype."""
    if stays_fp32(module, name):
        return 4
    return 0 if tensor.dtype == PASS_DTYPE else tensor.element_size()


def stays_fp32(module, name: str) -> bool:
    """Whether loading leaves a parameter or buffer in fp32 whatever the model's dtype."""
    kept = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){re.escape(k)}(\.|$)", name) for k in kept)


def _passes(module, config) -> tuple[tuple[CacheLayer, ...], tuple[int, int], list[float]]:
    """Two tokens, then one, then one: the cache, its (heads, head size), FLOPs a row of each."""
    cache, flops, seen = DynamicCache(config=config), [], []
    for new, past in ((2, 0), (1, 2), (1, 3)):
        ids = torch.zeros(ROWS, new, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, **with_cache(module, cache)}
        inputs |= {"position_ids": (torch.arange(new, device="meta") + past).expand(ROWS, new)}
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that meta tensors do not have
            out = module(**inputs)
        flops.append(counter.get_total_flops() / ROWS)
        seen.append([dict(cached_tensors(layer)) for layer in cache.layers])
    if not any(isinstance(getattr(out, n, None), Cache) for n in CACHES):
        raise ValueError("it is an encoder, or it keeps its state outside transformers' cache")
    before, after = seen[-2:]
    found = tuple(_cache_layer(*both) for both in zip(cache.layers, before, after, strict=True))
    keys = (t["keys"].shape for t in after if "keys" in t and t["keys"].dim() == 4)
    return found, next(((s[1], s[3]) for s in keys), (1, 0)), flops


def cached_tensors(layer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in one layer of a cache of transformers, whatever its kind."""
    for name, value in vars(layer).items():
        inside = value.items() if isinstance(value, dict) else [("", value)]
        yield from ((f"{name}{k}", t) for k, t in inside if isinstance(t, torch.Tensor))


def _cache_layer(layer, before: dict, after: dict) -> CacheLayer:
    """From the cached tensors at three and at four tokens."""
    token, row, once = [0, 0], [0, 0], 0
    for name, tensor in after.items():
        fixed = tensor.dtype != PASS_DTYPE
        size = tensor.element_size() if fixed else 1
        grown = tensor.numel() - before[name].numel()
        if grown:
            token[fixed] += grown // ROWS * size
        elif tensor.dim() and tensor.shape[0] == ROWS:
            row[fixed] += tensor.numel() // ROWS * size
        else:
            once += tensor.nbytes
    return CacheLayer(*token, *row, once, getattr(layer, "sliding_window", None))


def _split(flops: list[float], states: bool) -> tuple[float, float, float]:
    """FLOPs of a token, of a pair of query and key, and of a cached token in each step.

    FLOPs of a pass over n tokens after p cached ones: n * token + n * (n + p) * pair + p * past.
    With linear attention (`states`) a prefill works in chunks, so only the two steps are used.
    """
    first, second, third = flops
    slope = third - second  # pair + past
    pair = slope if states else max(0.0, (first - 2 * second + 4 * slope) / 2)
    return second - 2 * slope - pair, pair, slope - pair


def _experts(tensors: tuple[Tensor, ...], token_flops: float) -> tuple[int, int]:
    """Experts of a layer, and how many a token passes, by the FLOPs that it takes."""
    stacks = [t for t in tensors if t.role == "expert" and t.columns > 1]
    if not stacks:
        return 0, 0
    numbered = {m[1] for t in stacks if (m := re.search(r"experts\.(\d+)\.", t.name))}
    experts = max(len(numbered), *(t.count for t in stacks))
    dense = sum(t.numel for t in tensors if t.linear and t.role != "expert")
    dense += sum(t.numel for t in tensors if t.role == "router" and not t.linear and t.columns > 1)
    share = (token_flops / 2 - dense) / sum(t.numel for t in stacks)
    return experts, min(experts, max(1, round(share * experts)))
