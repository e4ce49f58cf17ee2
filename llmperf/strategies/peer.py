"""Other engines on the same weights and requests, to compare the kit's own loops with.

`generate` and `generate-static` are transformers' own generation, as one batch;
`transformers-continuous` is its continuous batching; `llamacpp` is llama.cpp, one request after
another. When sampling, each has its own random numbers, and the notes say so.
"""

from collections.abc import Mapping

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from llmperf import decoding
from llmperf.decoding.requests import Sampling, Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import llamacpp, run_control, transformers_continuous
from llmperf.strategies.strategy import Strategy, choice

ENGINES = ("generate", "generate-static", "transformers-continuous", "llamacpp")


def unavailable(model: Model, engine: str) -> str | None:
    """Why this engine cannot run this model here, or None."""
    if engine == "llamacpp":
        return llamacpp.unavailable(model)
    if engine == "generate-static" and not getattr(model.module, "_can_compile_fullgraph", True):
        return f"{type(model.module).__name__} does not support a static cache"
    return None


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests by arrival. Options: `engine` (default generate), `on_step`."""
    engine = options["engine"]
    if engine == "llamacpp":
        trace = llamacpp.run(model, workload)
    elif engine == "transformers-continuous":
        config = generation_config(workload.sampling, max_new_tokens=1)
        trace = transformers_continuous.run(model, workload, config)
    else:
        trace = _generate(model, workload, engine == "generate-static", options.get("on_step"))
    trace.notes.update(engine=engine, tokens_comparable=workload.sampling.greedy)
    return trace


def _generate(model: Model, workload: Workload, static: bool, on_step) -> Trace:
    """`model.generate` on one left-padded batch, each token timed when it can be read."""
    recorder = Recorder(workload.requests)
    requests = list(run_control.in_order(workload.requests))
    run_control.wait_for_arrival(requests[-1], recorder)
    recorder.started(r.id for r in requests)
    batch = decoding.pad(requests, model.torch_device)
    left = [r.max_new_tokens for r in requests]

    class Watch(StoppingCriteria):
        """Called after every step; stops nothing."""

        def __call__(self, ids, scores, **kwargs):
            tokens, now = ids[:, -1].tolist(), recorder.now()  # waits for the device
            for row, request in enumerate(requests):
                if left[row]:
                    recorder.token(request.id, tokens[row], now)
                    left[row] -= 1
            if on_step:
                on_step()
            return torch.zeros(len(requests), dtype=torch.bool, device=ids.device)

    model.module.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        generation_config=generation_config(
            workload.sampling,
            max_new_tokens=batch.steps,
            cache_implementation="static" if static else None,
        ),
        stopping_criteria=StoppingCriteriaList([Watch()]),
    )
    return recorder.trace()


def generation_config(sampling: Sampling, **how) -> GenerationConfig:
    """The same way of drawing in transformers' words; no end token."""
    drawn = {"do_sample": False}
    if not sampling.greedy:
        drawn = {"do_sample": True, "temperature": sampling.temperature}
        drawn |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    if sampling.suppress:
        drawn["suppress_tokens"] = list(sampling.suppress)
    return GenerationConfig(**drawn, eos_token_id=-1, pad_token_id=0, **how)


def _refuse(model: Model, level: int, options: Mapping) -> None:
    if why := unavailable(model, options["engine"]):
        raise ValueError(why)


STRATEGY = Strategy(
    "peer",
    run,
    lambda level, options: f"{options.get('engine', 'generate')}, {level} requests",
    style=5,
    options={"engine": choice(*ENGINES)},
    defaults={"engine": "generate"},
    refuse=_refuse,
    rows_per_step=lambda level, options: 1 if options.get("engine") == "llamacpp" else level,
    foreign=True,
)
