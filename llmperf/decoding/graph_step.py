"""A decoding step on a GPU as one CUDA graph: static keys and values, a position for each row.

Row r of the step is slot r. Rows that hold no request write at position 0 of a slot that nobody
reads. Prompts go through the model eagerly, and their keys and values are then copied in.
"""

import weakref
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from llmperf.decoding.batch import run_piece
from llmperf.decoding.requests import graph_size
from llmperf.models import with_cache

_steps: weakref.WeakSet = weakref.WeakSet()  # of every model
NOT_FUSED = "its operations are not fused: {}"
MOST_SHAPES = 256  # that torch compiles the step for: one for each (rows, length), of all models


class RowCache:
    """Keys and values of all layers; each row's new column is written at its `position`.

    It is what transformers' attention modules ask of a cache, and nothing more. `keys` and `values`
    hold one tensor a layer, (rows, kv_heads, length, head_dim); `position` (rows,).
    """

    is_compileable = True

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], position):
        self.keys, self.values, self.position = keys, values, position

    def update(self, key, value, layer: int, *args, **kwargs):
        """Write one column, key and value (rows, kv_heads, 1, head_dim); return the whole layer."""
        place = self.position[:, None, None, None]
        self.keys[layer].scatter_(2, place.expand_as(key), key)
        self.values[layer].scatter_(2, place.expand_as(value), value)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0):
        """The first row's position; masks and positions are given to the model explicitly."""
        return self.position[:1]


def forward(module, ids, position, keys, values) -> torch.Tensor:
    """One token a row: ids (rows, 1), position (rows,) → logits (rows, vocabulary)."""
    columns = torch.arange(keys[0].shape[2], device=ids.device)
    seen = columns <= position[:, None]  # (rows, length)
    out = module(
        input_ids=ids,
        attention_mask=seen[:, None, None],
        position_ids=position[:, None],
        **with_cache(module, RowCache(keys, values, position)),
    )
    return out.logits[:, -1]


def obstacle(module) -> str | None:
    """Why this model cannot run with static keys and values, or None."""
    config = module.config.get_text_config()
    if not getattr(module, "_can_compile_fullgraph", False):
        return f"{type(module).__name__} does not support a static cache"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r} and not 'sdpa'"
    if getattr(config, "sliding_window", None) is not None:
        return f"its attention slides over a window of {config.sliding_window} tokens"
    return None


class GraphStep:
    """The step of one model on a GPU, with the buffers and captured graphs of earlier runs."""

    def __init__(self, model):
        self._module, self.device = weakref.ref(model.module), model.torch_device
        self.function = _fused(forward)
        missing = self.function is forward and "Triton is not installed"
        self.not_fused = NOT_FUSED.format(missing) if missing else None
        self.kept: dict[tuple[int, int], list] = {}  # (rows, length) → buffers that nobody uses
        _steps.add(self)

    @property
    def module(self):
        """The model's; a step is kept with it (see `loops`), and must not keep it alive."""
        return self._module()


def free_graphs() -> None:
    """Free the buffers and graphs of every model: a run must not hold what another one used.

    All at once, since torch frees the cuBLAS workspace of a graph's stream with the graph, and a
    graph that lives on may have been captured on that stream: there are 32 in turn.
    """
    for step in _steps:
        step.kept.clear()


def _fused(function):
    """Fused by inductor where Triton is there (not on Windows); a graph works either way."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return function
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    return torch.compile(function, fullgraph=True, dynamic=False)


class GraphRows:
    """Static keys and values of `rows` slots, and a graph for each power of two of rows.

    On the CPU, where tests run it, steps run without a graph.
    """

    def __init__(self, step: GraphStep, rows: int, max_length: int):
        self._step, self._function = step, step.function
        self._rows, self._length = graph_size(rows, max_length)
        kept = step.kept.setdefault((self._rows, self._length), [])
        self.keys, self.values, self._graphs = kept.pop() if kept else (None, None, {})
        self._prompts: dict[int, DynamicCache] = {}

    def __del__(self):
        # graphs read these buffers, so keep both; not when the fused function was given up
        if self.keys is not None and self._function is self._step.function:
            kept = self._step.kept.setdefault((self._rows, self._length), [])
            kept.append((self.keys, self.values, self._graphs))

    def forward(self, pieces) -> torch.Tensor:
        """Logits (pieces with `last`, vocabulary), in the order of `pieces`."""
        steps = [p for p in pieces if p.start and len(p.ids) == 1 and p.slot not in self._prompts]
        found = {}
        if steps:  # before prompts are copied in: a step writes into rows that it does not use
            logits = self._decode(steps)
            found |= {p.slot: logits[p.slot : p.slot + 1] for p in steps}
        for piece in pieces:
            if piece not in steps:
                found[piece.slot] = run_piece(self._step.module, piece, self._prompts)
                if piece.last:
                    self._copy_prompt(piece.slot, self._prompts.pop(piece.slot))
        wanted = [found[p.slot] for p in pieces if p.last]
        return torch.cat(wanted) if wanted else torch.empty(0, device=self._step.device)

    def _copy_prompt(self, slot: int, cache: DynamicCache) -> None:
        if self.keys is None:
            empty = lambda x: x.new_zeros(self._rows, x.shape[1], self._length, x.shape[3])  # noqa: E731
            self.keys = [empty(layer.keys) for layer in cache.layers]
            self.values = [empty(layer.values) for layer in cache.layers]
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            columns = layer.keys.shape[2]
            keys[slot, :, :columns] = layer.keys[0]
            values[slot, :, :columns] = layer.values[0]

    def _decode(self, steps) -> torch.Tensor:
        """Logits (rows, vocabulary) of a step for the first rows, as many as a graph has."""
        rows = 1 << max(p.slot for p in steps).bit_length()
        ids, place = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for p in steps:
            ids[p.slot], place[p.slot] = p.ids[0], p.start
        if self._step.device.type == "cpu":
            return self._run(ids, place)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        graph, kept_ids, kept_place, logits = self._graphs[rows]
        kept_ids.copy_(ids)
        kept_place.copy_(place)
        graph.replay()
        return logits

    def _run(self, ids, place) -> torch.Tensor:
        rows = len(place)
        keys, values = ([t[:rows] for t in all_rows] for all_rows in (self.keys, self.values))
        return self._step.function(self._step.module, ids, place, keys, values)

    def _capture(self, rows: int):
        """Warm up on a side stream, then record; inputs and logits are read and written in place.

        Both write column 0 of every row: it is put back afterwards.
        """
        device = self._step.device
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        place = torch.zeros(rows, dtype=torch.long, device=device)
        buffers = [*self.keys, *self.values]
        first = [t[:rows, :, :1].clone() for t in buffers]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(ids, place)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            logits = self._run(ids, place)
        for tensor, column in zip(buffers, first, strict=True):
            tensor[:rows, :, :1] = column
        return graph, ids, place, logits
