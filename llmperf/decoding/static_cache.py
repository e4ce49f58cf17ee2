"""The loop `compiled`: a static cache and a step without Python between its operations.

On a CPU the step is three compiled functions around C++ kernels (fused.py). On a GPU it is one
CUDA graph, sampling inside. Keys and values are inputs of fixed size, so a longer text takes a
larger bucket instead of compiling each step. Where it cannot work the loop is `cached`, and the
plan says why.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import Sampling, next_tokens

if TYPE_CHECKING:
    import torch

    from llmperf.decoding.fused import Decoder
    from llmperf.models import Model

SMALLEST_BUCKET = 256  # positions; doubled until the text fits
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}  # of the logits' norm, compiled to eager
_PLANS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # module → {key: Plan}
_LOCK = threading.RLock()


class StaticKV:
    """Keys and values of all layers at full length; a new column is written at `slot`.

    `keys` and `values` hold one tensor a layer, (rows, kv_heads, bucket, head_dim); `slot` (1,).
    It is what transformers' attention modules ask of a cache, and nothing more.
    """

    is_compileable = True

    def __init__(self, keys: Sequence, values: Sequence, slot: torch.Tensor):
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, key, value, layer: int, *args, **kwargs):
        """Write one column and return the whole layer."""
        layer = layer if len(self.keys) > 1 else 0  # inside a layer compiled for all there is one
        self.keys[layer].index_copy_(2, self.slot, key)
        self.values[layer].index_copy_(2, self.slot, value)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0):
        """The column that is written next."""
        return self.slot


@dataclass
class Plan:
    """One step compiled for (rows, bucket), or the reason why there is none."""

    rows: int
    bucket: int  # longest text in tokens, prompt and new ones
    compile_s: float = 0.0
    reason: str | None = None  # set: the loop falls back to `cached`
    step: Callable | None = None  # as _on_cpu and _on_gpu return it
    decoder: Decoder | None = None  # on a CPU: what `step` runs
    buffers: list = field(default_factory=list, repr=False)  # (keys, values) that nobody uses now


def bucket(length: int) -> int:
    """The room reserved for a text of `length` tokens: a power of two, 256 or more."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def prepare(
    model: Model,
    rows: int,
    max_length: int,
    sampling: Sampling | None = None,
    progress: Callable[[str], None] = print,
) -> Plan:
    """The plan for `rows` texts of up to `max_length` tokens: compiled once, then kept.

    Every new plan is checked against one eager step. It never raises for a model that cannot be
    compiled: the plan then has a `reason`.
    """
    graphs = model.device != "cpu"
    if graphs and threading.current_thread() is not threading.main_thread():
        reason = "CUDA graphs work in the main thread only (pytorch#123177)"
        return Plan(rows, bucket(max_length), reason=reason)
    # only a CUDA graph holds the sampling, so only there another one needs another plan
    key = (rows, bucket(max_length), (sampling or Sampling()) if graphs else None)
    with _LOCK:  # a second thread waits for the plan instead of compiling it again
        plans = _PLANS.setdefault(model.module, {})
        if key not in plans:
            plans[key] = _plan(model, *key, progress)
        return plans[key]


def _plan(model: Model, rows: int, length: int, sampling: Sampling | None, progress) -> Plan:
    import torch

    start = time.perf_counter()
    plan = Plan(rows, length, reason=_obstacle(model, length))
    if plan.reason is None:
        try:
            with torch.no_grad():
                if model.device == "cpu":
                    plan.decoder = _decoder(model.module, rows)
                    plan.step = _on_cpu(plan.decoder)
                else:
                    plan.step = _on_gpu(model.module)
                _check(model, plan, sampling or Sampling(greedy=True))
        except Exception as error:  # compilers fail in many ways, and the answer is always eager
            first = (str(error).strip().splitlines() or ["no message"])[0]
            plan.step, plan.reason = None, f"{type(error).__name__}: {first[:200]}"
    plan.compile_s = time.perf_counter() - start
    what = f"decoding step of {model.label()}, batch {rows}, up to {length} tokens"
    if plan.reason:
        progress(f"Not compiled ({plan.reason}): the {what} runs eagerly")
    else:
        progress(f"Compiled the {what}, in {plan.compile_s:.1f} s")
    return plan


def _obstacle(model: Model, length: int) -> str | None:
    """Why this model cannot be compiled, or None."""
    config = model.module.config
    if not getattr(model.module, "_can_compile_fullgraph", False):
        return f"{type(model.module).__name__} does not support a static cache"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r} and not 'sdpa'"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        return f"its sliding window of {window} is shorter than the text"
    if model.device == "cpu" and model.dtype == "fp16":
        return "there is no fp16 kernel for a CPU: use bf16"
    return None


def _logits(module, ids, slot, start, keys, values):
    """The last tokens through `module` once: ids (rows, 1) → (rows, vocabulary)."""
    import torch

    # slot (1,): the column written; start (rows,): columns of padding
    columns = torch.arange(keys[0].shape[2], device=ids.device)
    seen = (columns <= slot) & (columns >= start[:, None])  # (rows, bucket)
    out = module(
        input_ids=ids,
        attention_mask=seen[:, None, None],
        position_ids=slot - start[:, None],
        past_key_values=StaticKV(keys, values, slot),
        use_cache=True,
    )
    return out.logits[:, -1]


def _decoder(module, rows: int) -> Decoder:
    from llmperf.decoding.fused import Decoder

    def forward(*inputs):
        logits = _logits(*inputs)
        return [logits, logits.argmax(-1)]  # compiled: torch's own takes 0.2 ms in bf16

    return Decoder(module, rows, forward)


def _on_cpu(decoder: Decoder) -> Callable:
    """One step: ids, slot, start, uniform, keys, values, sampling → the next tokens and logits."""

    def step(ids, slot, start, uniform, keys, values, sampling):
        logits, likeliest = decoder(ids, slot, start, keys, values)
        greedy = sampling.greedy and not sampling.suppress
        return likeliest if greedy else next_tokens(logits, sampling, uniform), logits

    return step


def _on_gpu(module) -> Callable:
    """As `_on_cpu`, replayed."""
    import torch

    def step(ids, slot, start, uniform, keys, values, sampling):
        logits = _logits(module, ids, slot, start, keys, values)
        return next_tokens(logits, sampling, uniform), logits

    graph = torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def replay(*inputs):
        torch.compiler.cudagraph_mark_step_begin()
        tokens, logits = graph(*inputs)
        return tokens.clone(), logits  # the next replay overwrites both

    return replay


def _prefill(model: Model, plan: Plan, batch):
    """The prompt, eagerly, as in `cached`: its last logits, and buffers that hold its keys."""
    from transformers import DynamicCache

    from llmperf.decoding import last_column, positions

    cache = DynamicCache(config=model.module.config)
    out = model.module(
        input_ids=batch.ids,
        attention_mask=batch.mask if batch.padded else None,
        position_ids=positions(batch.mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_column(batch.ids),
    )
    kv = [(x.keys, x.values) for x in cache.layers]
    buffers = plan.buffers.pop() if plan.buffers else _allocate(kv, plan.bucket)
    columns = batch.ids.shape[1]
    for made, kept in zip(kv, zip(*buffers, strict=True), strict=True):
        for source, target in zip(made, kept, strict=True):
            target[:, :, :columns] = source
    return out.logits[:, -1], buffers


def _allocate(kv, length: int):
    import torch

    def room(like):
        rows, heads, _, dim = like.shape
        buffer = like.new_zeros(rows, heads, length, dim)
        torch._dynamo.mark_static_address(buffer)  # a CUDA graph then reads it where it is
        return buffer

    return [room(k) for k, _ in kv], [room(v) for _, v in kv]


def _check(model: Model, plan: Plan, sampling: Sampling) -> None:
    """Compile by running one step, and compare its logits with the eager model's."""
    import torch

    from llmperf.decoding import pad, positions

    lengths = [5 + row % 3 for row in range(plan.rows)]
    vocabulary = model.module.config.vocab_size
    texts = [tuple((7 * i + 3 * n) % vocabulary for i in range(n)) for n in lengths]
    whole = pad([Request(i, t, 1) for i, t in enumerate(texts)], model.torch_device)
    short = pad([Request(i, t[:-1], 1) for i, t in enumerate(texts)], model.torch_device)
    expected = model.module(
        input_ids=whole.ids, attention_mask=whole.mask, position_ids=positions(whole.mask)
    ).logits[:, -1]
    _, (keys, values) = _prefill(model, plan, short)
    columns = short.ids.shape[1]
    slot = torch.tensor([columns], device=model.torch_device)
    start = columns - short.mask.sum(-1)
    last = whole.ids[:, -1:].contiguous()
    uniform = torch.zeros(plan.rows, dtype=torch.float64, device=model.torch_device)
    _, logits = plan.step(last, slot, start, uniform, keys, values, sampling)
    plan.buffers.append((keys, values))
    error = ((logits - expected).float().norm() / expected.float().norm()).item()
    if not error <= TOLERANCE[model.dtype]:
        raise ValueError(f"its logits differ from the eager ones by {error:.1%}")


def tokens(model: Model, plan: Plan, batch, sampling: Sampling, draws) -> Iterator[torch.Tensor]:
    """Decode a `decoding.Batch` with a plan; yields (rows,) a step. `draws` (rows, steps)."""
    import torch

    columns = batch.ids.shape[1]
    start = columns - batch.mask.sum(-1)
    with torch.no_grad():  # left again before each yield, so that a caller never runs inside
        logits, buffers = _prefill(model, plan, batch)
        chosen = next_tokens(logits, sampling, draws[:, 0])
        slot = torch.tensor([columns], device=batch.ids.device)
    try:
        yield chosen
        for step in range(1, batch.steps):
            with torch.no_grad():
                inputs = (chosen[:, None], slot, start, draws[:, step].contiguous())
                chosen, _ = plan.step(*inputs, *buffers, sampling)
                slot = slot + 1
            yield chosen
    finally:
        plan.buffers.append(buffers)


def loop(model: Model, batch, draw) -> Iterator[torch.Tensor]:
    """The decoding loop `compiled`, as `decoding.LOOPS` lists it: tokens of (rows,) a step."""
    from llmperf import decoding

    rows, columns = batch.ids.shape
    plan = prepare(model, rows, columns + batch.steps, draw.sampling)
    if plan.reason:
        yield from decoding.cached(model, batch, draw)
    else:
        yield from tokens(model, plan, batch, draw.sampling, draw.uniforms)


def plans(model: Model) -> list[Plan]:
    """Every plan made for this model so far: what compiling took, and why one fell back."""
    return list(_PLANS.get(model.module, {}).values())
