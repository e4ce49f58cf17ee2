"""One decoding step on a CPU: same weights, compiled in three parts that no Python stands between.

Eager torch spends most of a step outside of the arithmetic: it reads the weights of a matrix-vector
product at a third of the memory's speed and calls some thirty operations a layer. Here the
products are two C++ kernels (kernels.cpp), and what stands between them is fused by inductor. One
layer is compiled and serves all, because weights, keys and values are inputs; what comes before
the layers and after them is compiled once each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
KERNEL_ROWS = 16  # above this a product is bound by arithmetic, which torch's own does better
OPTIONS = {
    "size_asserts": False,  # all inputs are ours, and asking costs 3 % of a step
    "alignment_asserts": False,
    "cpp.min_chunk_size": 8192,  # elements that are worth waking another thread for
}


class Unsupported(ValueError):
    """This model's step cannot be compiled so; the message says why."""


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


class Decoder:
    """`forward(module, ids, slot, start, keys, values)` for a decoding step on a CPU, compiled.

    `forward` calls the module with a `compiled.StaticKV` of keys and values, and returns a list of
    tensors. What is compiled shares the module's weights; a Conv1D (GPT-2) holds its weight
    transposed, so it gets a second copy the right way round. Raises Unsupported.
    """

    def __init__(self, module, rows: int, forward: Callable):
        build_kernels()
        shared = [*module.parameters(), *module.buffers()]
        twin = copy.deepcopy(module, {id(t): t for t in shared})
        twin.config._attn_implementation = "llmperf"
        if rows <= KERNEL_ROWS:
            _use_kernel(twin)
        name, layers = _layers(twin)
        self._weights = _weights(layers)
        self._build = functools.partial(_build, twin, name, layers, forward)
        self._parts = None

    def __call__(self, ids, slot, start, keys, values) -> list:
        """ids (rows, 1), slot (1,), start (rows,), and keys and values of each layer."""
        if self._parts is None:
            self._parts = self._build(self._weights[0], ids, slot, start, keys, values)
        before, layer, after, outer = self._parts
        hidden, *rest = before(ids, slot, start, *outer)
        for weights, k, v in zip(self._weights, keys, values, strict=True):
            hidden = layer(hidden, k, v, slot, *rest, *weights)[0]
        return after(hidden, ids, slot, start, *outer)

    def in_cache(self) -> Decoder:
        """The same step on the first layer's weights alone, which a cache holds: to time the rest.

        It shares what is compiled, so call this one first.
        """
        other = copy.copy(self)
        other._weights = self._weights[:1] * len(self._weights)
        return other


def _build(twin, name: str, layers, forward: Callable, weights, ids, slot, start, keys, values):
    """The step's parts: before the layers, one layer, after them; and the weights of the outer two.

    In place of the layers stands a middle that notes what goes into them, and then gives back what
    it is told.
    """
    import torch

    middle = _middle()
    twin.set_submodule(name, torch.nn.ModuleList([middle]))
    own = dict(twin.named_parameters()) | dict(twin.named_buffers())

    def whole(outer, ids, slot, start):
        tensors = dict(zip(own, outer, strict=True))
        return forward(
            lambda **inputs: torch.func.functional_call(twin, tensors, kwargs=inputs),
            *(ids, slot, start, keys, values),
        )

    def before(ids, slot, start, *outer):
        whole(outer, ids, slot, start)
        return [middle.hidden, *(x for x in middle.rest if isinstance(x, torch.Tensor))]

    def after(hidden, ids, slot, start, *outer):
        middle.answer = hidden
        return whole(outer, ids, slot, start)

    inputs, outer = (ids, slot, start), list(own.values())
    first = _compile(before, [*inputs, *outer])
    hidden, *rest = first(*inputs, *outer)
    layer = _layer(layers[0], middle.rest, middle.spec)
    example = [hidden, keys[0], values[0], slot, *rest, *weights]
    inner = _compile(layer, example, cpp_wrapper=True)  # it runs most often: 4 % of a step
    last = _compile(after, [hidden, *inputs, *outer])
    return first, inner, last, outer


def _middle():
    import torch
    from torch.utils._pytree import tree_flatten

    class Middle(torch.nn.Module):
        answer = None

        def forward(self, hidden, *args, **kwargs):
            self.hidden = hidden
            self.rest, self.spec = tree_flatten((args, kwargs))
            return hidden if self.answer is None else self.answer

    return Middle()


def _layer(layer, rest: list, spec) -> Callable:
    """A layer as a function of its input, keys, values, slot, the tensors in `rest`, and its own.

    `rest` are the layer's other arguments, as leaves of the tree `spec`.
    """
    import torch
    from torch.utils._pytree import tree_unflatten

    from llmperf.decoding.static_cache import StaticKV

    names = [*dict(layer.named_parameters()), *dict(layer.named_buffers())]
    moving = [i for i, x in enumerate(rest) if isinstance(x, torch.Tensor)]

    def function(hidden, keys, values, slot, *tensors):
        leaves = [StaticKV([keys], [values], slot) if isinstance(x, StaticKV) else x for x in rest]
        for i, tensor in zip(moving, tensors, strict=False):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, spec)
        own = dict(zip(names, tensors[len(moving) :], strict=True))
        out = torch.func.functional_call(layer, own, (hidden, *args), kwargs)
        return [out[0] if isinstance(out, tuple) else out]

    return function


def _compile(function: Callable, example: list, **options) -> Callable:
    """Traced with fake tensors of these sizes, compiled by inductor with its `options`."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake")(*example)
    graph.graph.eliminate_dead_code()
    _join(graph)
    return torch._inductor.compile(graph, example, options=OPTIONS | options)


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


def _weights(layers) -> list[list]:
    """Each layer's tensors in one order. Raises Unsupported when two layers differ."""
    named = [dict(x.named_parameters()) | dict(x.named_buffers()) for x in layers]
    shapes = [{k: (t.shape, t.dtype) for k, t in tensors.items()} for tensors in named]
    if any(s != shapes[0] for s in shapes):
        raise Unsupported("its layers are not all alike")
    return [list(tensors.values()) for tensors in named]


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
