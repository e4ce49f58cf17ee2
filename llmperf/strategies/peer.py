"""Other engines on the same weights and requests, to compare the kit's own loops with.

`generate` and `generate-static` are transformers' own generation, as one batch; `llamacpp` is
llama.cpp, one request after another in a process of its own. Greedily `generate` gives the tokens
of `cached`; when sampling, each engine has its own random numbers, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmperf.decoding.requests import Stop, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import continuous, llamacpp, shared
from llmperf.strategies.strategy import Strategy, choice

ENGINES = ("generate", "generate-static", "llamacpp")


def unavailable(model: Model, engine: str) -> str | None:
    """Why this engine cannot run this model here, or None."""
    if engine == "llamacpp":
        return llamacpp.unavailable(model)
    if engine == "generate-static" and not getattr(model.module, "_can_compile_fullgraph", True):
        return f"{type(model.module).__name__} does not support a static cache"
    return None


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests by arrival. Options: `engine` (default generate), `on_step`."""
    if workload.stop != Stop():
        raise ValueError("peer generates forced lengths only: leave stop at its default")
    engine = options.get("engine", "generate")
    if engine == "llamacpp":
        return llamacpp.run(model, workload)
    recorder = Recorder(workload.requests)
    _generate(model, workload, recorder, engine == "generate-static", options.get("on_step"))
    return recorder.trace(engine=engine, tokens_comparable=workload.sampling.greedy)


def _generate(model: Model, workload: Workload, recorder: Recorder, static: bool, on_step) -> None:
    """`model.generate` on one left-padded batch, each token timed when it can be read."""
    from llmperf import decoding

    requests = list(shared.in_order(workload.requests))
    shared.wait_for_arrival(requests[-1], recorder)
    recorder.started(r.id for r in requests)
    batch = decoding.pad(requests, model.torch_device)
    config = continuous.generation_config(workload.sampling)
    config.max_new_tokens = batch.steps
    config.cache_implementation = "static" if static else None
    model.module.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        generation_config=config,
        stopping_criteria=_watch(requests, recorder, on_step),
    )


def _watch(requests, recorder: Recorder, on_step):
    """Criteria that stop nothing: generate calls them after every step."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    left = [r.max_new_tokens for r in requests]

    class Watch(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            tokens, now = ids[:, -1].tolist(), recorder.now()  # waits for the device
            for row, request in enumerate(requests):
                if left[row]:
                    recorder.token(request.id, tokens[row], now)
                    left[row] -= 1
            if on_step:
                on_step()
            return torch.zeros(len(requests), dtype=torch.bool, device=ids.device)

    return StoppingCriteriaList([Watch()])


def _refuse(model: Model, level: int, options: Mapping) -> None:
    if why := unavailable(model, options.get("engine", "generate")):
        raise ValueError(why)


STRATEGY = Strategy(
    "peer",
    run,
    lambda level, options: f"{options.get('engine', 'generate')}, batches of {level}",
    style=5,
    options={"engine": choice(*ENGINES)},
    refuse=_refuse,
    rows_per_step=lambda level, options: 1 if options.get("engine") == "llamacpp" else level,
    foreign=True,
)
