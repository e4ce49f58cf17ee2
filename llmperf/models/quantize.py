"""Give a model quantised linear layers, on torch's own kernels or on those of bitsandbytes."""

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmperf.models.meta import stays_fp32
from llmperf.models.quantization import BNB, GROUP

FAST_ROWS = {torch.float32: 1, torch.bfloat16: 8, torch.float16: 8}  # beyond, torch's int8 is slow


def quantize(module, word: str, device: str = "cpu"):
    """Replace the linear layers of a loaded module one after another, in place; returns it."""
    for name, child in list(_linears(module)):
        module.set_submodule(name, _quantized(child.to(device), word))
    return module.to(device)


def random_module(config, word: str | None, dtype, device: str):
    """A seeded random model of these shapes that never stands unquantised in memory.

    Each layer gets its weights and is quantised before the next one gets any.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linears = dict(_linears(module))
    for name, child in list(module.named_modules()):
        _fill(module, child, device)
        if word and name in linears:
            module.set_submodule(name, _quantized(child, word))
    module.tie_weights()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if stays_fp32(module, name):  # as `from_pretrained` does
            tensor.data = tensor.data.float()
    return module


def _fill(module, child, device: str) -> None:
    tensors = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
    tied = child is module.get_output_embeddings() and module.config.tie_word_embeddings
    if tensors and not (tied and len(tensors) == 1):
        child.to_empty(device=device, recurse=False)
        module._init_weights(child)


def _linears(module) -> Iterator[tuple[str, object]]:
    head = module.get_output_embeddings()
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear | Conv1D) and child is not head:
            yield name, child


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
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        whole = (weight.float() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, False)
        self.scale = torch.nn.Parameter(scale[:, 0].to(weight.dtype), False)
        self.bias = bias

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])  # (rows, in)
        if x.device.type == "cpu" and flat.shape[0] <= FAST_ROWS[x.dtype]:
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
        both = both.transpose(0, 1).contiguous().to(weight.dtype)  # (groups, out, 2)
        self.weight = torch.nn.Parameter(packed, False)
        self.scale = torch.nn.Parameter(both, False)
        self.bias = bias

    def forward(self, x):
        flat = pad(x.reshape(-1, self.inputs), (0, -self.inputs % GROUP)).contiguous()
        out = torch._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.scale)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias
