"""Give a model quantised linear layers, on torch's own kernels or on those of bitsandbytes."""

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmperf.models.meta import is_linear, stays_fp32
from llmperf.models.quantization import BNB, GROUP, OURS

SLICE_ROWS = 8192  # of an int8 matrix, expanded at a time: an output layer is large
COLUMN_STEP = 32  # torch's int8 product reads past the end of a row that is no multiple of it
FAST_ROWS = {torch.float32: 1, torch.bfloat16: 8, torch.float16: 8}  # beyond, torch's int8 is slow


def quantize(module, word: str, device: str = "cpu"):
    """Replace the linear layers of a loaded module one after another, in place; returns it."""
    for name, child, how in list(_linears(module, word)):
        module.set_submodule(name, _quantized(child.to(device), how))
    return module.to(device)


def random_module(config, word: str | None, dtype, device: str):
    """A seeded random model of these shapes that never stands unquantised in memory.

    Each layer gets its weights and is quantised before the next one gets any.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linears = {name: how for name, _, how in _linears(module, word)} if word else {}
    head = module.get_output_embeddings()
    for name, child in list(module.named_modules()):
        _fill(module, child, device)
        if name in linears:
            if _tied(module, child):
                child.weight = module.get_input_embeddings().weight
            module.set_submodule(name, _quantized(child, linears[name]))
    if module.get_output_embeddings() is head:  # else it no longer shares the embedding's weights
        module.tie_weights()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if stays_fp32(module, name):  # as `from_pretrained` does
            tensor.data = tensor.data.float()
    return module


def _fill(module, child, device: str) -> None:
    tensors = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
    if tensors and not (_tied(module, child) and len(tensors) == 1):
        child.to_empty(device=device, recurse=False)
        weights = [p.data for p in child.parameters(recurse=False) if p.is_floating_point()]
        for weight in weights:
            weight.fill_(math.nan)
        module._init_weights(child)
        for weight in weights:
            if weight.isnan().any():  # some models forget it (Qwen3-Next's gate, Apertus' xIELU)
                weight.normal_(std=0.02)


def _tied(module, child) -> bool:
    return child is module.get_output_embeddings() and module.config.tie_word_embeddings


def _linears(module, word: str) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Name, layer and quantisation of what `word` converts."""
    head = module.get_output_embeddings()
    for name, child in module.named_modules():
        how = word_of_head(word) if child is head else word
        if how and is_linear(child):
            yield name, child, how


def word_of_head(word: str | None) -> str | None:
    """How `word` quantises the output layer: ours in int8, others not at all.

    With only this layer of smollm2-135m quantised, the likeliest token stayed the same at 96 % of
    the 6,602 positions of the kit's prompts in int8, and at 79 % in int4.
    """
    return "int8" if word in OURS else None


def _quantized(linear, word: str):
    weight = linear.weight.data
    if isinstance(linear, Conv1D):  # Conv1D (GPT-2) holds it as (in, out)
        weight = weight.t().contiguous()
    return layer(weight, word, linear.bias)


def layer(weight, word: str, bias=None):
    """A linear layer of these weights (out, in), quantised: x (..., in) → (..., out)."""
    if word in BNB:
        return _bitsandbytes(weight, bias, word)
    return (Int8 if word == "int8" else Int4)(weight, bias)


def _bitsandbytes(weight, bias, word: str):
    import bitsandbytes as bnb

    (rows, columns), device = weight.shape, weight.device
    how = {"bias": bias is not None, "device": "meta"}
    if word == "bnb-4":
        form = {"quant_type": "nf4", "compress_statistics": False}  # as transformers loads it
        made = bnb.nn.Linear4bit(columns, rows, compute_dtype=weight.dtype, **form, **how)
        # bitsandbytes quantises when the parameter is moved
        made.weight = bnb.nn.Params4bit(weight, False, **form).to(device)
    else:
        made = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=6.0, **how)
        int8 = bnb.nn.Int8Params(weight.cpu(), False, has_fp16_weights=False)
        made.weight = int8.to(device)  # moved from a GPU it would stay as it is
    made.bias = bias if bias is None else torch.nn.Parameter(bias.data, False)
    return made


class Int8(torch.nn.Module):
    """Symmetric int8: one scale an output, in the model's dtype. Weights (out, in)."""

    def __init__(self, weight, bias):
        super().__init__()
        integers, scales = torch.empty_like(weight, dtype=torch.int8), []
        for rows, to in zip(weight.split(SLICE_ROWS), integers.split(SLICE_ROWS), strict=True):
            scales.append(rows.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127)
            to.copy_((rows.float() / scales[-1]).round())
        self.integers = torch.nn.Parameter(integers, False)
        self.scale = torch.nn.Parameter(torch.cat(scales)[:, 0].to(weight.dtype), False)
        self.bias = bias

    @property
    def weight(self):
        """The weights in the model's dtype; some models ask their output layer for it."""
        return self.integers * self.scale[:, None]

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])  # (rows, in)
        few = flat.shape[0] <= FAST_ROWS[x.dtype] and flat.shape[1] % COLUMN_STEP == 0
        if few:
            out = torch._weight_int8pack_mm(flat.contiguous(), self.integers, self.scale)
        else:
            slices = zip(self.integers.split(SLICE_ROWS), self.scale.split(SLICE_ROWS), strict=True)
            out = torch.cat([linear(flat, w * scale[:, None]) for w, scale in slices], -1)
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
        both = both.transpose(0, 1).contiguous().to(weight.dtype)  # (groups, out, 2)
        self.weight = torch.nn.Parameter(packed, False)
        self.scale = torch.nn.Parameter(both, False)
        self.bias = bias

    def forward(self, x):
        flat = pad(x.reshape(-1, self.inputs), (0, -self.inputs % GROUP)).contiguous()
        out = torch._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scale)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias
