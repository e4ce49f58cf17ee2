"""Fewer bits a weight: what each quantisation word means, and how a model gets it.

Only the matrices of linear layers are quantised; embeddings, head, norms and biases stay as they
are. `int8` and `int4` run on torch's own kernels, `bnb-8` and `bnb-4` on bitsandbytes (optional
extra `bnb`), and a checkpoint that declares `awq` or `gptq` on gptqmodel (optional extra `awq`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

from llmperf.models import shapes

OURS, BNB, CHECKPOINT = ("int8", "int4"), ("bnb-8", "bnb-4"), ("awq", "gptq")
WORDS = ("none", *OURS, *BNB, *CHECKPOINT)
ALIASES = {"nf4": "bnb-4", "bnb-nf4": "bnb-4", "bnb-int8": "bnb-8"}
GROUP = 64  # inputs that share a scale, in int4 and bnb-4
FAST_ROWS = {"fp32": 1, "bf16": 8, "fp16": 8}  # beyond, torch's int8 kernel for CPUs is slow
NEEDS = {"bnb": "bitsandbytes", "awq": "gptqmodel"}  # {our optional extra: its module}


class Missing(ValueError):
    """A quantisation whose library is not installed; the message says which extra has it."""


def canonical(word: str | None) -> str | None:
    """The one word of several that mean the same: nf4 is bnb-4."""
    return ALIASES.get(word, word)


def check(word: str | None, dtype: str, device: str) -> str | None:
    """The canonical word. Raises ValueError for one that is unknown or cannot run in `dtype` on
    `device`, and Missing where the library that it needs is not installed."""
    word = canonical(word)
    if word is None:
        return None
    if word not in WORDS:
        known = ", ".join((*WORDS, *ALIASES))
        raise ValueError(f"unknown quantization {word!r}: leave it None, or choose {known}")
    if word == "int4" and device != "cpu":
        raise ValueError("int4 has torch's kernel for CPUs only: use bnb-4 on a GPU")
    if word == "int4" and dtype != "bf16":
        raise ValueError(f"int4 computes in bf16, and dtype is {dtype}: use dtype bf16")
    if word in BNB + CHECKPOINT:
        require(word)
    return word


def require(word: str) -> None:
    """Raise Missing unless what runs bnb-… or a checkpoint in awq or gptq is installed."""
    extra = "bnb" if word in BNB else "awq"
    if importlib.util.find_spec(NEEDS[extra]) is None:
        raise Missing(
            f"{word} needs {NEEDS[extra]}, which is not installed here: install the"
            f" optional extra with pip install 'llmperf-study[{extra}]', or choose another"
            " quantization"
        )


def declared(config) -> str | None:
    """The word for what a checkpoint's configuration declares, such as awq; None for nothing."""
    found = shapes.from_config(config.to_dict()).quantization
    return found if found is None or found in BNB else found.partition("-")[0]


def loading_config(word: str | None, dtype: str):
    """What `from_pretrained` takes to quantise layer by layer while it loads (bitsandbytes)."""
    if word not in BNB:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if word == "bnb-8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def quantize(module, word: str, device: str = "cpu"):
    """Replace the linear layers of a loaded module one after another, in place; returns it."""
    for name, child in list(_linears(module)):
        module.set_submodule(name, _quantized(child.to(device), word))
    return module.to(device)


def random_module(config, word: str, dtype, device: str, seed: int):
    """A seeded random model of these shapes that never stands unquantised in memory.

    It is laid out without storage; then each layer gets its weights and is quantised before the
    next one gets any. `dtype` is torch's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linears = dict(_linears(module))
    for name, child in list(module.named_modules()):
        _fill(module, child, device)
        if name in linears:
            module.set_submodule(name, _quantized(child, word))
    module.tie_weights()
    return module


def _fill(module, child, device: str) -> None:
    """Give one layer its storage and the weights that its family starts with."""
    own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
    tied = child is module.get_output_embeddings() and module.config.tie_word_embeddings
    if own and not tied:
        child.to_empty(device=device, recurse=False)
        module._init_weights(child)


def _linears(module) -> Iterator[tuple[str, object]]:
    """The layers to quantise by name: all linear ones but the head.

    Raises ValueError for a mixture of experts, whose matrices stand in stacks.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()
    for name, child in module.named_modules():
        if any(p.dim() == 3 for p in child.parameters(recurse=False)):
            raise ValueError("a mixture of experts cannot be quantised: leave quantization None")
        if isinstance(child, torch.nn.Linear | Conv1D) and child is not head:
            yield name, child


def _quantized(linear, word: str):
    """The layer in place of `linear`, on its device."""
    import torch

    weight = linear.weight.data
    if not isinstance(linear, torch.nn.Linear):  # Conv1D (GPT-2) holds it as (in, out)
        weight = weight.t().contiguous()
    return layer(weight, word, linear.bias)


def layer(weight, word: str, bias=None):
    """A linear layer of these weights (out, in), quantised: x (..., in) → (..., out)."""
    if word in BNB:
        return _bitsandbytes(weight, bias, word)
    Int8, Int4 = _layers()
    return (Int8 if word == "int8" else Int4)(weight, bias)


def _bitsandbytes(weight, bias, word: str):
    import bitsandbytes as bnb
    import torch

    (rows, columns), device, dtype = weight.shape, weight.device, weight.dtype
    how = {"bias": bias is not None, "device": "meta"}
    if word == "bnb-4":
        form = {"quant_type": "nf4", "compress_statistics": False}  # as transformers loads it
        layer = bnb.nn.Linear4bit(columns, rows, compute_dtype=dtype, **form, **how)
        # bitsandbytes quantises when the parameter is moved
        layer.weight = bnb.nn.Params4bit(weight, False, **form).to(device)
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=6.0, **how)
        layer.weight = bnb.nn.Int8Params(weight, False, has_fp16_weights=False).to(device)
    layer.bias = bias if bias is None else torch.nn.Parameter(bias.data, False)
    return layer


@functools.cache
def _layers():
    """The two layers on torch's own kernels; made here so that importing this needs no torch."""
    import torch
    from torch.nn.functional import linear, pad

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

    class Int8(torch.nn.Module):
        """Symmetric int8: one scale an output, in the model's dtype. Weights (out, in)."""

        def __init__(self, weight, bias):
            super().__init__()
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
            whole = (weight.float() / scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(whole, False)
            self.scale = torch.nn.Parameter(scale[:, 0].to(weight.dtype), False)
            self.bias = bias

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])  # (rows, in)
            if x.device.type == "cpu" and flat.shape[0] <= FAST_ROWS[names[x.dtype]]:
                out = torch._weight_int8pack_mm(flat.contiguous(), self.weight, self.scale)
            else:
                out = linear(flat, self.weight.to(x.dtype)) * self.scale
            out = out.reshape(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias

    class Int4(torch.nn.Module):
        """Asymmetric 4 bit: a scale and a zero for each 64 inputs of an output, in bf16."""

        def __init__(self, weight, bias):
            super().__init__()
            self.inputs = weight.shape[1]
            groups = pad(weight.float(), (0, -self.inputs % GROUP)).unflatten(1, (-1, GROUP))
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp(min=1e-9)
            whole = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).flatten(1)
            packed = torch._convert_weight_to_int4pack_for_cpu(whole, 1)  # (out, in / 2)
            both = torch.cat((scale, low + 8 * scale), -1)  # the kernel counts from -8
            self.weight = torch.nn.Parameter(packed, False)
            both = both.transpose(0, 1).contiguous().to(weight.dtype)  # (groups, out, 2)
            self.scale = torch.nn.Parameter(both, False)
            self.bias = bias

        def forward(self, x):
            flat = pad(x.reshape(-1, self.inputs), (0, -self.inputs % GROUP)).contiguous()
            out = torch._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scale)
            out = out.reshape(*x.shape[:-1], -1)
            return out if self.bias is None else out + self.bias

    return Int8, Int4
