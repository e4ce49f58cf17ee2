"""The prediction of a run, made before it: bound, expected step, memory, and whether it fits."""

import statistics
from collections.abc import Mapping
from dataclasses import replace

from llmperf import decoding, machine, models, predict
from llmperf.decoding.requests import several
from llmperf.decoding.trace import Trace
from llmperf.machine import ceilings
from llmperf.measure import step_time
from llmperf.measure.condition import Condition
from llmperf.strategies import served


class DoesNotFit(ValueError):
    """The run surely does not fit; the message has the arithmetic."""


def predict_run(condition: Condition, expect: bool = False, limits: Mapping | None = None) -> dict:
    """What must move and run at least in this run, at this machine's measured ceilings.

    `bound_s` is the least time for all of it, `limit` the ceiling that sets it, `bound_tpot_ms` the
    least time of a step. `expect` adds how long a step should take: see `step_time`. `limits` are
    ceilings as `ceilings.measure` gives them (default: this machine's, from the cache). Empty for
    what runs on another machine.
    """
    if not _processes(condition):
        return {}
    m = condition.model
    limits = limits or ceilings.cached(m.device)
    bandwidth = limits["read_bytes_per_s"]["median"]
    flops = (limits["flops_per_s"][m.dtype] or {}).get("median")  # None: not measured in this dtype
    spec = spec_of(condition, prepared(condition).loop)
    whole = predict.bound(_cost(condition, spec), bandwidth, flops)
    middle = spec.prompt_tokens + spec.new_tokens // 2
    step = predict.decode_bound(spec, middle, bandwidth, flops)
    found = {
        "read_bytes_per_s": bandwidth,
        "flops_per_s": flops,
        "most_read_bytes_per_s": ceilings.highest_read(limits),
        "bound_s": whole.seconds,
        "limit": whole.limit,
        "bound_tpot_ms": step.seconds * 1e3,
        "weights_bytes": predict.weights_bytes(m.shape, m.dtype, m.quantization),
    }
    known = condition.runner
    if not known.served:
        level = "process" if m.device == "cpu" else "reserved"
        further = getattr(prepared(condition).step, "extra_bytes", 0)  # see `CpuStep`
        further += sum(predict.weights_bytes(*other) for other in models.other_models(m))
        low, high = (
            further + x for x in predict.memory(_longest(condition), idle_bytes=0).at(level)
        )
        found |= {"memory_level": level, "memory_low_bytes": low, "memory_high_bytes": high}
    if expect:
        found |= step_time.expected(condition, spec, step, limits)
    return found


def audit(condition: Condition, prediction: Mapping, trace: Trace) -> dict:
    """The prediction with what the run adds: MBU, MFU, `plausible`, and `why` with the arithmetic.

    More than the highest bandwidth sample, or the FLOP/s, makes the record implausible. The cost is
    that of the loop that ran, for the tokens that came out.
    """
    if not prediction:
        return {}
    ran = trace.notes.get("loop")  # several where threads differ: then the one asked for
    spec = spec_of(condition, ran if ran in decoding.LOOPS else condition.loop)
    done = trace.output_tokens / (condition.level * spec.new_tokens)  # some were refused, or ended
    cost = _cost(condition, spec) * min(1.0, done)
    bandwidth, flops = prediction["most_read_bytes_per_s"], prediction["flops_per_s"]
    verdict = predict.audit(cost, trace.duration_s, bandwidth, flops)
    found = {"mbu": verdict.mbu, "mfu": verdict.mfu, "plausible": verdict.plausible}
    if not verdict.plausible:  # a cache may serve all but the first of those that share weights
        shared = condition.options.get("weights") == "shared"
        cost = replace(cost, bytes=cost.bytes / max(1, spec.processes if shared else spec.threads))
        verdict = predict.audit(cost, trace.duration_s, bandwidth, flops)
        found["plausible"] = verdict.plausible
    return {**prediction, **found, "why": verdict.sentence}


def prepared(condition: Condition) -> decoding.Prepared:
    """The loop that will run (made ready now, once a model), with why and what that took."""
    if condition.runner.foreign or condition.model.module is None:
        return decoding.Prepared(condition.loop)
    return decoding.prepare(condition.model, condition.loop)


def check_fits(condition: Condition) -> None:
    """Raise DoesNotFit, with the arithmetic, when the run surely does not fit.

    Only the ledger's low bound counts: what might fit is tried.
    """
    known, m = condition.runner, condition.model
    if not _processes(condition):
        return
    spec = _longest(condition)
    free, held = predict.free_and_held(m)
    if known.served:  # server processes need their own memory; what kept ones hold is available
        options = known.with_defaults(condition.options)
        spec = replace(spec, processes=1) if options.get("weights") == "shared" else spec
        single = predict.memory(replace(spec, processes=1), idle_bytes=0, beside_another=True).low
        held = single * len(served.pids())
    book = predict.memory(spec, idle_bytes=0, beside_another=known.served)
    fit = predict.judge(book, free + held)
    if fit.verdict == "does not fit":
        already = f" ({held / predict.GIB:.2f} GiB of it held already)" if held else ""
        raise DoesNotFit(fit.sentence + already)


def _longest(condition: Condition) -> predict.RunSpec:
    longest = {n: max(several(getattr(condition, n))) for n in ("prompt_tokens", "new_tokens")}
    return replace(spec_of(condition, condition.loop), **longest)


def spec_of(condition: Condition, loop: str) -> predict.RunSpec:
    """The run as numbers, of the mean lengths, in the loop that runs."""
    m, known, how = condition.model, condition.runner, (condition.level, condition.options)
    threads = known.threads(*how)
    return predict.RunSpec(
        m.shape,
        m.dtype,
        m.quantization,
        condition.rows_per_step,
        round(statistics.mean(several(condition.prompt_tokens))),
        round(statistics.mean(several(condition.new_tokens))),
        loop,
        processes=max(1, _processes(condition)),
        threads=threads if threads > 1 else 0,
        streams=known.streams(*how),
        platform=machine.platform_word(m.device),
    )


def _processes(condition: Condition) -> int:
    """Processes that compute; none where the requests go to another machine."""
    return condition.runner.processes(condition.level, condition.options)


def _cost(condition: Condition, spec: predict.RunSpec) -> predict.Cost:
    """Bytes and FLOPs of the whole run at least."""
    return predict.run_cost(spec) * (condition.level / spec.rows)
