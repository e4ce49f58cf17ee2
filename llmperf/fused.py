"""A twin of a model for decoding on a CPU: same weights, its layers one compiled function.

Eager torch spends most of a step outside of the arithmetic: it reads the weights of a matrix-vector
product at a third of the memory's speed and calls some thirty operations a layer. Here the
products are two C++ kernels (kernels.cpp), and what stands between them is fused by inductor. One
layer is compiled and serves all, because weights, keys and values are inputs.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
KERNEL_ROWS = 16  # above this a product is bound by arithmetic, which torch's own does better


class Unsupported(ValueError):
    """This model cannot run as a twin; the message says why."""


@functools.cache
def build_kernels() -> None:
    """Compile the kernels (seconds; kept on disk) and register them as torch operations."""
    import torch
    from torch._inductor.codecache import CppCodeCache
    from transformers import AttentionInterface

    CppCodeCache.load(SOURCE.read_text(encoding="utf-8"))

    @torch.library.register_fake("llmperf::linear")
    def linear(x, weights, biases):
        return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))

    @torch.library.register_fake("llmperf::attend")
    def attend(query, key, value, mask, scale):
        rows, heads, _, dim = query.shape
        return query.new_empty(rows, 1, heads, dim)

    AttentionInterface.register("llmperf", _attention)


def _attention(module, query, key, value, mask, dropout=0.0, scaling=None, **extra):
    """One query a row against the whole cache; as transformers' attention functions are called."""
    import torch

    unknown = [k for k in ("softcap", "s_aux", "position_bias") if extra.get(k) is not None]
    if unknown:
        raise Unsupported(f"its attention uses {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.llmperf.attend(query.contiguous(), key, value, mask, scale), None


def twin(module, rows: int):
    """A copy of `module` that shares its weights and decodes `rows` rows, one column a call.

    The call takes a 4-D mask and a `compiled.StaticKV`. Raises Unsupported. A Conv1D (GPT-2) holds
    its weight transposed; the twin of one keeps a second copy the right way round.
    """
    build_kernels()
    shared = [*module.parameters(), *module.buffers()]
    other = copy.deepcopy(module, {id(t): t for t in shared})
    other.config._attn_implementation = "llmperf"
    if rows <= KERNEL_ROWS:
        _use_kernel(other)
    name, layers = _layers(other)
    other.set_submodule(name, _stack(layers))
    return other


def _layers(module):
    """The list of decoder layers and its name."""
    import torch

    kinds = set(getattr(module, "_no_split_modules", None) or ())
    found = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.ModuleList)
        and len(child)
        and {type(layer).__name__ for layer in child} <= kinds
    ]
    if len(found) != 1:
        raise Unsupported(f"it has {len(found)} lists of decoder layers instead of one")
    return found[0]


def _use_kernel(module) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    class Product(torch.nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.weight, self.bias = weight, bias

        def forward(self, x):
            biases = [] if self.bias is None else [self.bias]
            return torch.ops.llmperf.linear(x.contiguous(), [self.weight], biases)

    for name, child in list(module.named_modules()):
        if type(child) is torch.nn.Linear:
            module.set_submodule(name, Product(child.weight, child.bias))
        elif type(child) is Conv1D:
            upright = torch.nn.Parameter(child.weight.detach().t().contiguous(), False)
            module.set_submodule(name, Product(upright, child.bias))


def _stack(layers):
    """A list of one module which runs all `layers`, compiled at its first call."""
    import torch

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers
            self.function = None

        def forward(self, hidden, *args, **kwargs):
            cache, rest, spec = _taken_apart(args, kwargs)
            if self.function is None:
                self.weights = _weights(layers)
                self.function = _compile(layers[0], hidden, cache, rest, spec, self.weights[0])
            rest = [x for x in rest if isinstance(x, torch.Tensor)]
            for weights, keys, values in zip(self.weights, cache.keys, cache.values, strict=True):
                hidden = self.function(hidden, keys, values, cache.slot, *rest, *weights)[0]
            return hidden

    return torch.nn.ModuleList([Stack()])


def _taken_apart(args, kwargs):
    """The arguments of a layer as a flat list, with the cache taken out."""
    from torch.utils._pytree import tree_flatten

    from llmperf.compiled import StaticKV

    leaves, spec = tree_flatten((args, kwargs))
    cache = next(x for x in leaves if isinstance(x, StaticKV))
    return cache, leaves, spec


def _weights(layers) -> list[list]:
    """Each layer's tensors in one order. Raises Unsupported when two layers differ."""
    named = [dict(x.named_parameters()) | dict(x.named_buffers()) for x in layers]
    shapes = [{k: (t.shape, t.dtype) for k, t in tensors.items()} for tensors in named]
    if any(s != shapes[0] for s in shapes):
        raise Unsupported("its layers are not all alike")
    return [list(tensors.values()) for tensors in named]


def _compile(layer, hidden, cache, rest, spec, weights):
    """One layer as a function of flat tensors: traced with fake tensors, compiled by inductor."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_unflatten

    from llmperf.compiled import StaticKV

    names = [*dict(layer.named_parameters()), *dict(layer.named_buffers())]
    moving = [i for i, x in enumerate(rest) if isinstance(x, torch.Tensor)]

    def function(hidden, keys, values, slot, *tensors):
        leaves = [StaticKV([keys], [values], slot) if x is cache else x for x in rest]
        for i, tensor in zip(moving, tensors, strict=False):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, spec)
        own = dict(zip(names, tensors[len(moving) :], strict=True))
        out = torch.func.functional_call(layer, own, (hidden, *args), kwargs)
        return [out[0] if isinstance(out, tuple) else out]

    tensors = [rest[i] for i in moving]
    example = [hidden, cache.keys[0], cache.values[0], cache.slot, *tensors, *weights]
    graph = make_fx(function, tracing_mode="fake")(*example)
    _join(graph)
    return torch._inductor.compile(graph, example)


def _join(module) -> None:
    """Make one product of those that have one input, such as query, key and value."""
    import torch

    linear, graph = torch.ops.llmperf.linear.default, module.graph
    of_input: dict[tuple, list] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        x, _, biases = node.args
        of_input.setdefault((x, len(biases)), []).append(node)
    for (x, _), nodes in of_input.items():
        with graph.inserting_before(nodes[0]):
            weights, biases = (sum((list(n.args[i]) for n in nodes), []) for i in (1, 2))
            whole = graph.call_function(linear, (x, weights, biases))
            end = 0
            for node in nodes:
                start, end = end, end + node.meta["val"].shape[-1]
                part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, start, end))
                node.replace_all_uses_with(part)
        for node in nodes:
            graph.erase_node(node)
    module.recompile()
