"""The compiled loop and slots: the tokens of the eager loop, and a reason where it cannot run."""

import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import psutil
import pytest
import tiny_models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmperf import decoding, models
from llmperf.decoding import (
    GREEDY,
    Request,
    Sampling,
    Slots,
    cpu_library,
    cpu_step,
    graph_step,
    loops,
)
from llmperf.decoding import slots as slots_file
from llmperf.decoding.batch import Piece
from llmperf.decoding.requests import Stop
from llmperf.decoding.sampling import next_tokens
from llmperf.models import Model, quantize
from llmperf.strategies import STRATEGIES, model_engine

DRAWN = Sampling(temperature=0.8, top_k=20, top_p=0.9, suppress=(0,))
SMALL = dict(tiny_models.SMALL, pad_token_id=0)
MULTIPLIERS = dict(
    embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.3
)
MORE = {
    "phi3": ("phi3", SMALL),
    "granite": ("granite", dict(SMALL, **MULTIPLIERS)),
    "stablelm": ("stablelm", SMALL),
    "smollm3": ("smollm3", SMALL),
    "starcoder2": ("starcoder2", SMALL),
    "seed_oss": ("seed_oss", dict(SMALL, head_dim=8)),
    "odd sizes": (
        "llama",
        dict(SMALL, hidden_size=44, intermediate_size=53, head_dim=10, vocab_size=97),
    ),
    **{  # query heads for each key and value head, which the step takes up to four at a time
        f"{n} sharing": (
            "llama",
            dict(
                SMALL,
                hidden_size=240,
                head_dim=64,
                num_attention_heads=2 * n,
                num_key_value_heads=2,
            ),
        )
        for n in (1, 2, 3, 4, 5, 8)
    },
    "olmo2": ("olmo2", SMALL),
    "gpt_neox": ("gpt_neox", SMALL),
    "glm": ("glm", dict(SMALL, head_dim=8)),
    "mixtral": ("mixtral", SMALL),
}
COMPILED = (
    "gpt2 gpt2-inner llama llama-bias-tied mistral qwen2 qwen2-sliding qwen3 gemma gemma2 gemma3"
).split() + ["phi3", "granite", "stablelm", "smollm3", "starcoder2", "seed_oss", "odd sizes"]
COMPILED += [case for case in MORE if "sharing" in case]
FALLS_BACK = {  # family → what the reason says
    "deepseek-v2": "no k_proj",
    "deepseek-v3": "no q_proj",
    "olmo2": "no input_layernorm",
    "gpt_neox": "no norm",
    "glm": "its logits differ",
    "mixtral": "no c_fc",
}


def tiny(case: str, dtype="fp32", scale=6.0) -> Model:
    """A tiny random model whose logits are far from uniform, so that a wrong input shows."""
    family, fields = (MORE | tiny_models.CONFIGS)[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields | dict(bos_token_id=1, eos_token_id=2))
    module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    module = module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return Model(case, module, None, None, dtype, "cpu", "random", None, 0.0, None)


@pytest.fixture(scope="module")
def loaded():
    made = {}
    return lambda case: made.setdefault(case, tiny(case))


def requests(lengths, new=12):
    texts = [tuple((7 * i + 3 * n) % 90 + 3 for i in range(n)) for n in lengths]
    return [Request(i, t, new + i, seed=i) for i, t in enumerate(texts)]


def batch(model, asked, loop, sampling=DRAWN, stop=None):
    """The tokens of each request, decoded as one batch."""
    steps = decoding.decode(model, asked, loop=loop, sampling=sampling, stop=stop)
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def served(slots: Slots, asked, arrive=lambda step: 9, dropped=()):
    """The tokens of each request when they enter free slots as they arrive."""
    waiting, tokens, step = list(asked), {r.id: [] for r in asked}, 0
    while waiting or slots.busy:
        for _ in range(min(arrive(step), slots.free, len(waiting))):
            request = waiting.pop(0)
            slots.admit(request.id, request)
        for key, token, _ in slots.step():
            tokens[key].append(token)
        for key in dropped:
            if len(tokens[key]) > 2:
                slots.drop(key)
        step += 1
    return [tokens[r.id] for r in asked]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_gives_the_tokens_of_cached(loaded, case):
    model, asked = loaded(case), requests((9, 4, 17))
    assert decoding.prepare(model).reason is None
    for sampling in (GREEDY, DRAWN):
        assert batch(model, asked, "compiled", sampling) == batch(model, asked, "cached", sampling)


@pytest.mark.parametrize(("case", "why"), FALLS_BACK.items())
def test_what_cannot_be_compiled_runs_cached_and_says_why(loaded, case, why):
    model, asked = loaded(case), requests((4, 9))
    assert batch(model, asked, "compiled") == batch(model, asked, "cached")
    recorder = decoding.Recorder(asked)
    decoding.run(model, asked, recorder, loop="compiled", sampling=DRAWN)
    notes = recorder.trace().notes
    assert notes["loop"] == "cached"
    assert why in notes["fallback"]


@pytest.mark.parametrize("seed", range(8))
def test_tokens_do_not_depend_on_who_shares_the_slots(loaded, seed, monkeypatch):
    """Random lengths, slots, arrivals, pieces and cancels: each request gets its tokens alone."""
    dice, model = random.Random(seed), loaded(random.Random(seed).choice(COMPILED))
    asked = [
        Request(i, tuple(dice.randrange(3, 90) for _ in range(dice.randint(1, 30))),
                dice.randint(1, 25), seed=dice.randrange(99))
        for i in range(12)
    ]  # fmt: skip
    stop = Stop(end_ids=frozenset({dice.randrange(90)}))
    alone = [batch(model, [r], "cached", DRAWN, stop)[0] for r in asked]
    dropped = dice.sample(range(12), 3)
    monkeypatch.setattr(slots_file, "JOINT_PREFILL_TOKENS", dice.choice((1, 4, 64)))
    slots = Slots(model, dice.randint(1, 5), 64, sampling=DRAWN, stop=stop)
    found = served(slots, asked, lambda _: dice.randint(0, 3), dropped)
    for i, (tokens, expected) in enumerate(zip(found, alone, strict=True)):
        assert tokens == (expected[: len(tokens)] if i in dropped else expected)
        assert len(tokens) > 2 or tokens == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tokens_do_not_depend_on_the_number_of_threads(loaded, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, asked = loaded("qwen3"), requests((9, 4, 17))
        assert batch(model, asked, "compiled") == batch(model, asked, "cached")
    finally:
        torch.set_num_threads(before)


def test_several_threads_of_the_program_share_one_step(loaded):
    model, asked = loaded("llama"), [requests((n,)) for n in (3, 6, 9)]
    got = {}

    def work(i):
        got[i] = batch(model, asked[i], "compiled")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == {i: batch(model, r, "cached") for i, r in enumerate(asked)}


def test_two_interleaved_generators_do_not_share_keys(loaded):
    model, asked = loaded("llama"), (requests((9,)), requests((5,)))
    both = [decoding.decode(model, r, loop="compiled", sampling=GREEDY) for r in asked]
    ours = zip(*zip(*both, strict=True), strict=True)
    expected = [decoding.decode(model, r, loop="cached", sampling=GREEDY) for r in asked]
    assert [list(x) for x in ours] == [list(x) for x in expected]


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2", "odd sizes"])
def test_bf16_is_as_close_to_fp32_as_the_eager_model(case):
    exact, half = tiny(case, scale=3.0), tiny(case, "bf16", scale=3.0)
    ids = [(5 * i) % 90 + 3 for i in range(40)]
    exact.module.load_state_dict(half.module.state_dict())  # the same rounded weights
    step = cpu_step.CpuStep(half)
    ours = step(ids, [0] * 40, range(40), [True] * 40, cpu_step.CpuRows(step, 1, 40))
    eager, truth = (m.module(torch.tensor([ids])).logits[0].float() for m in (half, exact))
    assert (ours - truth).norm() < 1.2 * (eager - truth).norm()


@pytest.mark.parametrize("sampling", [
    GREEDY,
    Sampling(greedy=True, suppress=(3, 90)),
    Sampling(top_k=50, top_p=0.9),
    Sampling(temperature=0.6, top_k=7, suppress=tuple(range(20))),
    Sampling(temperature=1.7, top_k=1000, top_p=0.99),
    Sampling(top_k=5000, top_p=0.5),
])  # fmt: skip
def test_the_step_draws_the_tokens_that_torch_draws(loaded, sampling):
    step = decoding.prepare(loaded("llama")).step
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (91, 127, 128, 1003):
        logits = torch.randn(200, vocabulary, generator=generator) * 3
        uniform = torch.rand(200, generator=generator, dtype=torch.float64)
        ours = step.next_tokens(logits, sampling, uniform).tolist()
        assert ours == next_tokens(logits, sampling, uniform).tolist()


def in_int8(model: Model) -> Model:
    return replace(model, module=quantize.quantize(model.module, "int8"), quantization="int8")


def test_int8_gives_the_tokens_of_the_eager_int8_model():
    model = in_int8(tiny("llama"))
    assert decoding.prepare(model).reason is None
    asked = requests((9, 4))
    assert batch(model, asked, "compiled", GREEDY) == batch(model, asked, "cached", GREEDY)


@pytest.mark.skipif("AVX512" not in cpu_library.processor(), reason="torch packs otherwise here")
def test_int4_is_as_close_as_the_eager_int4_model():
    torch.manual_seed(0)
    wide = dict(SMALL, hidden_size=128, intermediate_size=192, head_dim=32, num_key_value_heads=4)
    config = AutoConfig.for_model("llama", **wide)
    module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    module = quantize.quantize(module.to(torch.bfloat16), "int4")
    model = Model("int4", module, None, None, "bf16", "cpu", "random", "int4", 0.0, None)
    assert decoding.prepare(model).reason is None


def test_a_prompt_longer_than_one_call_is_split(loaded, monkeypatch):
    monkeypatch.setattr(cpu_step, "MOST_ROWS", 7)
    model, asked = loaded("llama"), requests((30, 5, 19))
    assert batch(model, asked, "compiled") == batch(model, asked, "cached")


def test_a_request_longer_than_a_slot_is_refused(loaded):
    slots = Slots(loaded("llama"), 1, 16)
    with pytest.raises(ValueError, match="= 22, but a slot holds 16"):
        slots.admit(0, Request(0, tuple(range(10)), 12))
    slots.admit(1, Request(1, (1, 2), 4))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        slots.admit(2, Request(2, (1, 2), 4))


def test_slots_refuse_the_loop_without_a_cache(loaded):
    with pytest.raises(ValueError, match="keeps no keys and values"):
        Slots(loaded("llama"), 1, 16, loop="recompute")


def test_prefill_in_pieces_lets_running_requests_go_on(loaded, monkeypatch):
    """While a prompt of 40 enters in pieces of 8, the other request gets a token in each step."""
    monkeypatch.setattr(slots_file, "JOINT_PREFILL_TOKENS", 8)
    slots = Slots(loaded("llama"), 2, 64)
    slots.admit("runs", requests((3,), 20)[0])
    slots.step()
    slots.admit("joins", Request(1, tuple(range(3, 43)), 4))
    got = [[key for key, *_ in slots.step()] for _ in range(5)]
    assert got == [["runs"]] * 4 + [["runs", "joins"]]


@pytest.mark.parametrize(
    ("loop", "steps"),
    [("compiled", [[], [1, 2]]), ("cached", [[1], [1, 2]])],  # in one pass; one after another
)
def test_prompts_that_wait_enter_by_what_a_pass_can_hold(loaded, loop, steps, monkeypatch):
    monkeypatch.setattr(slots_file, "JOINT_PREFILL_TOKENS", 8)
    slots = Slots(loaded("llama"), 3, 64, loop=loop)
    slots.admit(0, requests((3,), 20)[0])
    slots.step()
    for key in (1, 2):
        slots.admit(key, Request(key, tuple(range(3, 19)), 9))
    assert [[key for key, *_ in slots.step() if key] for _ in steps] == steps


def test_prompts_enter_whole_where_no_request_waits_for_them(loaded, monkeypatch):
    monkeypatch.setattr(slots_file, "JOINT_PREFILL_TOKENS", 8)
    slots = Slots(loaded("llama"), 2, 64)
    for key in range(2):
        slots.admit(key, Request(key, tuple(range(3, 43)), 4))
    assert [key for key, *_ in slots.step()] == [0, 1]


def without(monkeypatch, message):
    def fails():
        raise cpu_step.Unsupported(message)

    monkeypatch.setattr(cpu_step, "library", fails)


def test_without_a_compiler_it_falls_back(monkeypatch):
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu_library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(cpu_step.Unsupported, match="there is no C compiler"):
        cpu_library._compiler()
    without(monkeypatch, "there is no C compiler")
    assert decoding.prepare(tiny("llama")).reason == "there is no C compiler"


def test_gcc_is_not_taken_on_windows(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: f"C:/{name}.exe")
    monkeypatch.setattr(cpu_library.sys, "platform", "win32")
    assert cpu_library._compiler() == ("C:/clang.exe",)


def test_code_for_one_processor_is_not_loaded_on_another(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    built = []
    monkeypatch.setattr(cpu_library, "_build", lambda compiler, target: built.append(target))
    monkeypatch.setattr(cpu_library, "_compiler", lambda: ("cc",))
    for model in ("EPYC 9354", "Xeon 6980P", "EPYC 9354"):
        monkeypatch.setitem(cpu_library.PROBES, "cpu_model", lambda model=model: model)
        with pytest.raises(cpu_step.Unsupported, match="cannot be kept or loaded"):
            cpu_library.library.__wrapped__()
    assert built[0] == built[2] != built[1]


def test_a_library_that_was_cut_off_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    cpu_library.library.__wrapped__()
    (built,) = (p for p in (tmp_path / "step").iterdir() if p.suffix != ".sha256")
    whole = built.stat().st_size
    built.unlink()  # the one that is loaded keeps its pages
    built.write_bytes(b"cut off")
    cpu_library.library.__wrapped__()
    assert abs(built.stat().st_size - whole) < whole / 10


def test_a_compiler_does_not_read_what_is_meant_for_this_process(monkeypatch, tmp_path):
    seen = {}

    def run(command, **how):
        seen.update(how)
        raise OSError("enough")

    monkeypatch.setattr(cpu_library.subprocess, "run", run)
    with pytest.raises(cpu_step.Unsupported, match="did not run"):
        cpu_library._build(("cc",), tmp_path / "step.so")
    assert seen["stdin"] == subprocess.DEVNULL


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "step.c"
    broken.write_text("this is not C")
    monkeypatch.setattr(cpu_library, "SOURCE", broken)
    with pytest.raises(cpu_step.Unsupported, match="the C compiler failed: .*error"):
        cpu_library._build(cpu_library._compiler(), tmp_path / "step.so")


def test_a_compiler_may_have_blanks_in_its_path_and_say_what_is_no_text(monkeypatch, tmp_path):
    compiler = tmp_path / "my tools" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nprintf 'error: \\377\\376' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert cpu_library._compiler() == (str(compiler),)
    if os.name != "nt":
        with pytest.raises(cpu_step.Unsupported, match="the C compiler failed: error"):
            cpu_library._build(cpu_library._compiler(), tmp_path / "step.so")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a compiler is a shell script")
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
def test_a_processor_with_shorter_vectors_gets_the_same_tokens(processor, monkeypatch, tmp_path):
    if "avx2" not in cpu_library.processor():
        pytest.skip("this processor has no AVX2")
    compiler = tmp_path / "cc"
    swap = f'[ "$x" = -march=native ] && x=-march={processor}'
    compiler.write_text(
        f'#!/bin/sh\nfor x; do shift; {swap}; set -- "$@" "$x"; done\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    cpu_library.library.cache_clear()
    try:
        asked = requests((9, 4, 17, 2, 5, 3, 8, 6, 7, 1, 2, 3, 4, 5, 6))  # tiles of 8, 4, 2 and 1
        for case in ("llama", "gemma3", "odd sizes", "5 sharing"):
            model = tiny(case)
            assert batch(model, asked, "compiled") == batch(model, asked, "cached")
            assert decoding.prepare(model).reason is None
        assert decoding.prepare(tiny("llama", "bf16")).reason is None
        assert decoding.prepare(in_int8(tiny("llama"))).reason is None
    finally:
        cpu_library.library.cache_clear()


@pytest.mark.parametrize("target", ["x86_64-windows-gnu", "aarch64-macos", "aarch64-linux-gnu"])
def test_the_step_compiles_for_other_systems(target, tmp_path):
    pytest.importorskip("ziglang", reason="needs the optional extra `compiler`")
    flags = [f for f in cpu_library.FLAGS if f != "-march=native"]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *flags, "-shared"]
    made = tmp_path / "step"
    subprocess.run([*command, "-o", str(made), str(cpu_library.SOURCE)], check=True)
    assert made.stat().st_size > 10_000


def test_a_step_that_computes_something_else_is_refused(monkeypatch):
    right = cpu_step.CpuStep.__call__
    monkeypatch.setattr(cpu_step.CpuStep, "__call__", lambda *a: right(*a) * 1.5)
    assert "differ from the eager ones by 50.0%" in decoding.prepare(tiny("llama")).reason


def test_a_cache_that_cannot_be_written_leaves_the_eager_loop_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path / "file"))
    cpu_library.library.cache_clear()
    found = decoding.prepare(tiny("llama"))
    cpu_library.library.cache_clear()
    assert found.loop == "cached" and "cannot be kept or loaded" in found.reason


def test_a_step_takes_as_many_threads_as_torch_has_at_that_moment():
    """More, then fewer, then more again: the others sleep, and the logits stay the same."""
    model = tiny("llama")
    step = decoding.prepare(model).step
    rows, before, found = cpu_step.CpuRows(step, 1, 8), torch.get_num_threads(), []
    busy = {}
    try:
        for threads in (2, 4, 2, 1, 3):
            torch.set_num_threads(threads)
            cpu_s, start = cpu_seconds(), time.monotonic()
            busy[threads] = 0
            while time.monotonic() < start + (0.5 if busy[threads] >= threads else 30):
                logits = step([5], [0], [0], [True], rows)
                gained = [s - cpu_s.get(id, 0.0) for id, s in cpu_seconds().items()]
                # Counted in steps of 10 ms; one that goes to sleep looks around for a moment.
                busy[threads] = sum(s >= max(0.02, 0.2 * max(gained)) for s in gained)
            found.append(logits)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert busy == {1: 1, 2: 2, 3: 3, 4: 4}


def cpu_seconds():
    """Processor time of each thread of this process."""
    return {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}


def test_a_step_that_is_timed_past_the_tables_reads_the_enlarged_ones():
    model, seen = tiny("llama"), []
    step = decoding.prepare(model).step
    before, library = step.layers[0].cosine, step.library

    class Watched:
        def __getattr__(self, name):
            return getattr(library, name)

        def run_step(self, description, call):
            seen.append(description.layers[0].cosine)
            return library.run_step(description, call)

    step.library = Watched()
    step.first_layer_seconds(1, 200, repeats=1)
    assert seen == [step.layers[0].cosine] * 2 and before not in seen


def test_the_step_is_prepared_once_a_model(loaded):
    model = loaded("llama")
    assert decoding.prepare(model) is decoding.prepare(model)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma"])
def test_rows_of_a_graph_give_the_tokens_of_cached(case, monkeypatch):
    """The GPU's rows, on the CPU without a graph: positions, masks and copies are the same."""
    model = tiny(case)
    assert graph_step.obstacle(model.module) is None
    monkeypatch.setattr(graph_step, "_fused", lambda function: function)
    step = loops.Prepared("compiled", None, 0.0, graph_step.GraphStep(model))
    monkeypatch.setitem(loops._chosen, model.module, step)
    asked = requests((9, 4, 17, 1))
    assert batch(model, asked, "compiled") == batch(model, asked, "cached")
    monkeypatch.setattr(slots_file, "SEPARATE_PREFILL_TOKENS", 4)
    slots = Slots(model, 3, 64, sampling=DRAWN)
    assert served(slots, asked) == [batch(model, [r], "cached")[0] for r in asked]


def test_every_batch_of_a_graph_runs_once_before_a_measurement(monkeypatch):
    model, rows = tiny("llama"), []
    monkeypatch.setattr(graph_step, "_fused", lambda function: function)
    graph = graph_step.GraphStep(model)
    monkeypatch.setitem(loops._chosen, model.module, loops.Prepared("compiled", None, 0.0, graph))
    run = graph_step.GraphRows._run
    seen = lambda self, ids, place: rows.append(len(place)) or run(self, ids, place)  # noqa: E731
    monkeypatch.setattr(graph_step.GraphRows, "_run", seen)
    decoding.warm_up(model, 6, {300, 40})
    assert set(rows) == {1, 2, 4, 8} and buffers(graph) == {(8, 512): 1, (8, 256): 1}
    decoding.warm_up(model, 1, {40}, copies=3)
    assert buffers(graph) == {(1, 256): 3}, "a small batch holds the memory of a large one"
    held = [Slots(model, 1, 40) for _ in range(3)]  # three requests that take turns
    assert buffers(graph) == {(1, 256): 0}
    del held
    other = graph_step.GraphStep(tiny("gpt2"))
    other.kept[1, 256] = [(None, None, {})]
    decoding.warm_up(model, 1, {40})
    assert buffers(graph) == {(1, 256): 1} and not other.kept, "another model holds its graphs"


def test_graphs_of_a_function_that_was_given_up_are_not_kept(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(graph_step, "_fused", lambda function: function)
    graph = graph_step.GraphStep(model)
    rows = graph_step.GraphRows(graph, 1, 40)
    rows.forward([Piece(0, (1, 2, 3), 0, True)])
    graph.function = lambda *args: graph_step.forward(*args)
    graph.kept.clear()
    del rows  # later than the change, as when an exception held it
    assert not graph.kept


def buffers(step) -> dict:
    return {size: len(kept) for size, kept in step.kept.items()}


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_smaller_batch_uses_the_buffers_of_the_others(batch_size, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(graph_step, "_fused", lambda function: function)
    graph = graph_step.GraphStep(model)
    monkeypatch.setitem(loops._chosen, model.module, loops.Prepared("compiled", None, 0.0, graph))
    work = decoding.Workload(requests((9, 4, 7, 3, 5)), GREEDY)
    STRATEGIES["batch"](model, work, {"batch_size": batch_size})
    assert buffers(graph) == {(4, 256): 1}


def test_a_group_that_is_not_full_uses_the_buffers_of_a_full_one(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(graph_step, "_fused", lambda function: function)
    graph = graph_step.GraphStep(model)
    monkeypatch.setitem(loops._chosen, model.module, loops.Prepared("compiled", None, 0.0, graph))
    monkeypatch.setattr(model_engine.models, "load", lambda **spec: model)
    made = model_engine.load({"spec": {}, "folder": None})
    how = {"rows": 8, "max_length": 40, "loop": "compiled", "processes": 1, "threads": None}
    slots = made("groups", **how)
    for request in requests((9, 4, 7)):
        slots.admit(request.id, request)
    while slots.free < 8:
        slots.step()
    assert buffers(graph) == {(8, 256): 1}


def test_a_graph_is_checked_before_it_is_promised(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(graph_step, "_fused", lambda function: broken)
    step = loops._graph_step(model)  # without Triton it works
    assert step.function is graph_step.forward and buffers(step) == {(1, 256): 1}
    found = loops._prepare(model, on_gpu=True)
    why = "its operations are not fused: Failed to find C compiler"
    assert (found.loop, found.reason) == ("compiled", why)
    monkeypatch.setattr(graph_step, "forward", lambda *args: 2 * plain(*args))
    with pytest.raises(ValueError, match="its logits differ from the eager ones"):
        loops._graph_step(model)


def test_without_triton_a_graph_is_plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as on Windows
    step = graph_step.GraphStep(tiny("llama"))
    assert step.function is plain
    assert step.not_fused == "its operations are not fused: Triton is not installed"


def broken(*_):
    raise RuntimeError("Failed to find C compiler")


plain = graph_step.forward


def test_models_that_need_more_than_static_keys_are_refused_on_a_gpu():
    assert "slides over a window" in graph_step.obstacle(tiny("mistral").module)


@pytest.mark.gpu
def test_worker_threads_fall_back_on_a_gpu():
    model = replace(tiny("llama"), device="cuda:0")
    model.module.to("cuda:0")
    found = []
    thread = threading.Thread(target=lambda: found.append(decoding.prepare(model)))
    thread.start()
    thread.join()
    assert "main thread" in found[0].reason


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_cached_on_a_gpu():
    model = replace(tiny("llama"), device="cuda:0")
    model.module.to("cuda:0")
    asked = requests((9, 4, 17))
    assert batch(model, asked, "compiled", GREEDY) == batch(model, asked, "cached", GREEDY)


def test_a_compiled_model_that_nobody_holds_is_freed(tiny_folder):
    model = models.load(str(tiny_folder), dtype="fp32", device="cpu")
    list(decoding.decode(model, [Request(0, (1, 2), 3)], loop="compiled"))
    assert decoding.prepare(model, "compiled").loop == "compiled"
    module = weakref.ref(model.module)
    del model
    gc.collect()
    assert module() is None


def test_the_step_of_a_gpu_does_not_hold_its_model(tiny_folder):
    model = models.load(str(tiny_folder), dtype="fp32", device="cpu")
    step = graph_step.GraphStep(model)
    module = weakref.ref(model.module)
    del model
    gc.collect()
    assert module() is None and step.module is None
