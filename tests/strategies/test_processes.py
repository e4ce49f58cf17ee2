"""Processes: same tokens, own and shared memory, death and hanging noticed, nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch

import llmperf
from llmperf import machine, models, predict, strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.sampling import GREEDY, Sampling
from llmperf.decoding.trace import agreement
from llmperf.measure import Condition, measure, prediction
from llmperf.measure.records import Store
from llmperf.strategies import STRATEGIES, model_engine, served, server

SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.9)
run = STRATEGIES["processes"]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to stop a process with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 64 MiB: weights that a unique set size shows beside the libraries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.5,
    )
    path = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).save_pretrained(path)
    models.byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small(folder):
    return models.load(str(folder), dtype="fp32", device="cpu")


def make(model, n=5, prompt=(3, 17, 9), new=(6, 4, 9), sampling=GREEDY):
    return workload.build(model.tokenizer, n, prompt, new, sampling=sampling)


def workers_left():
    """Worker processes below this one, and files of weights that nobody maps any more."""
    found = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
    return found + list(Path(tempfile.gettempdir()).glob("llmperf-weights-*"))


def is_worker(process):
    try:
        return "llmperf.strategies.inference" in process.cmdline()
    except psutil.Error:
        return False


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory):
    """Another run of the kit on this machine may have its own file of weights just now."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert not workers_left()


@pytest.fixture(scope="module")
def outcomes(small):
    """One pool of two workers for each kind of weights: traces of both samplings."""
    found = {}
    for weights in ("own", "shared"):
        with strategies.session():
            for sampling in (GREEDY, SAMPLED):
                options = {"workers": 2, "weights": weights}
                found[weights, sampling] = run(small, make(small, sampling=sampling), options)
    return found


@pytest.mark.parametrize("weights", ["own", "shared"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_same_tokens_as_sequential(small, outcomes, weights, sampling):
    reference = STRATEGIES["sequential"](small, make(small, sampling=sampling), {})
    trace = outcomes[weights, sampling]
    found = agreement(trace, reference)
    assert tuple(found.values()) == (5, 5, None)
    assert trace.digest() == reference.digest()


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_times_stand_on_one_clock_and_cover_the_slowest_worker(outcomes, weights):
    trace = outcomes[weights, SAMPLED]
    for r in trace.requests:
        times = [r.submitted_s, r.started_s, *r.token_s, trace.duration_s]
        assert times == sorted(times)
    assert {r.worker for r in trace.requests} == {"0", "1"}
    first = [min(r.started_s for r in trace.requests if r.worker == w) for w in "01"]
    ends = [max(r.token_s[-1] for r in trace.requests if r.worker == w) for w in "01"]
    assert max(first) < min(ends)  # both were at work at once


def test_shared_weights_are_in_memory_once(outcomes):
    """64 MiB of weights stand in the unique set of each `own` worker, and of no `shared` one."""
    unique = {
        weights: [w["uss_bytes"] for w in outcomes[weights, SAMPLED].notes["workers"]]
        for weights in ("own", "shared")
    }
    least = min(unique["own"]) - max(unique["shared"])
    assert 40 * 2**20 < least < 100 * 2**20


def test_workers_say_what_they_took(outcomes):
    for trace in outcomes.values():
        workers = trace.notes["workers"]
        assert sum(w["requests"] for w in workers) == 5
        assert all(w["rss_bytes"] > w["uss_bytes"] > 0 and w["load_s"] > 0 for w in workers)
        assert trace.notes["intra_op_threads"] == max(1, machine.usable_cores() // 2)
        assert "mps_daemon" in trace.notes


def test_a_single_process_gets_back_the_threads_that_a_run_before_took(tiny):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        slots = model_engine.load({"spec": asdict(tiny.source), "folder": None})
        how = {"batching": "slots", "rows": 1, "max_length": 8, "loop": "cached"}
        for threads, expected in ((1, 1), (None, 3)):
            slots(**how, processes=1, threads=threads)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_worker_on_a_card_is_capped_and_forgets_the_peaks_of_the_run_before(tiny, monkeypatch):
    """Freed graphs are given back before the peak is set to what is there now."""
    slots = model_engine.load({"spec": asdict(tiny.source), "folder": None})
    seen = []
    monkeypatch.setattr(predict, "cap_allocator", lambda model, n: seen.append(f"capped to 1/{n}"))
    monkeypatch.setattr(model_engine.decoding, "free_graphs", lambda: seen.append("freed"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    slots("slots", rows=1, max_length=8, loop="cached", processes=2, threads=1)
    assert seen == ["capped to 1/2", "freed", "emptied", "reset"]


def test_what_a_card_holds_is_read_before_its_processes_start(small, monkeypatch):
    """And processes that would be idle leave the card."""
    seen = []

    class Kept:
        model, weights, running = small, "own", 0

        def start(self, n):
            self.running = n
            seen.append(f"{n} started")

        def pids(self, start=0):
            return list(range(self.running))[start:]

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(served, "Server", lambda *_, **how: Kept())
    monkeypatch.setattr(served, "torch_in_use", lambda: torch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    monkeypatch.setattr(served.gpu, "used_bytes", lambda device: seen.append(f"read {device}"))
    on_card = replace(small, device="cuda:0")
    with strategies.session():
        for n in (1, 2, 1):
            served.ensure_started(on_card, n)
    fresh = ["emptied", "read cuda:0", "1 started"]
    assert seen == [*fresh, "2 started", "closed", *fresh, "closed"]


def test_beside_its_parent_each_process_is_a_further_one(small, monkeypatch):
    """Under Windows the first process pays 0.82 GiB for what all share, and the parent has paid."""
    on_card = replace(small, device="cuda:0")
    monkeypatch.setattr(prediction.machine, "platform_word", lambda device: "windows")
    monkeypatch.setattr(predict, "free_and_held", lambda model: (2**29, 0))
    prediction.check_fits(Condition(on_card, "processes", 3))


def killed_while_running(model, options, wound):
    """Run long requests and wound a process at their first tokens; gives the reason of each."""
    with strategies.session():
        STRATEGIES["processes"].ready(model, 2, options)
        victim = random.choice(served._kept[0].pids())
        work = make(model, 2, 8, 4000)

        def wounding():
            while not any(p.ids for p in served._kept[0].processes):
                time.sleep(0.01)
            time.sleep(0.1)
            wound(psutil.Process(victim))

        thread = threading.Thread(target=wounding)
        thread.start()
        trace = run(model, work, options)
        thread.join()
        assert {r.status for r in trace.requests} == {"error"}
        reasons = {r.reason for r in trace.requests}
        again = run(model, make(model, 2, 8, 3), options)  # both start anew and are warm
        assert {r.status for r in again.requests} == {"ok"}
        return reasons


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_its_exit_code(small):
    (words,) = killed_while_running(small, {"weights": "shared"}, lambda p: p.kill())
    assert "the inference process ended" in words
    if os.name == "posix":
        assert "(SIGKILL)" in words


@posix
@pytest.mark.slow
def test_a_hanging_worker_ends_the_run(small, monkeypatch):
    monkeypatch.setattr(server, "STALL_S", 3)
    (words,) = killed_while_running(small, {}, lambda p: p.suspend())
    assert "no step ended for 3 s" in words


def test_an_error_in_a_worker_comes_back_in_its_words(small):
    with pytest.raises(ValueError, match="unknown loop 'fast'"):
        run(small, make(small, 1), {"loop": "fast"})


@pytest.mark.slow
def test_the_sweep_goes_on_after_a_death_and_idle_workers_are_not_counted(
    small, tmp_path, monkeypatch
):
    """Two workers die, one alone runs; the memory of two idle ones is in no other condition."""
    answered, deaths = served.Server.run, []

    def deadly(server, *args, **how):
        trace = answered(server, *args, **how)
        if len(server.pids()) == 2 and not deaths:
            deaths.append(psutil.Process(server.pids()[1]).kill())
            time.sleep(0.2)  # until it is dead
        return trace

    conditions = [
        Condition(small, name, level, prompt_tokens=8, new_tokens=tokens)
        for name, level, tokens in (
            ("processes", 2, 4),
            ("processes", 2, 40),
            ("processes", 1, 40),
            ("sequential", 1, 40),
        )
    ]
    monkeypatch.setattr(served.Server, "run", deadly)
    store = Store(tmp_path / "records.jsonl")
    rows = measure("x", conditions, store, repeats=2, seed=1).frame
    assert len(rows) == 8 and not workers_left()
    assert set(rows.status) == {"ok"} and deaths  # it died after its run: the next one starts anew
    assert (rows.agree == rows.compared).all()
    lows = rows.groupby(["strategy", "level"]).max_rss_bytes
    assert lows.max()["sequential", 1] < lows.min()["processes", 1]
    assert lows.max()["processes", 1] < lows.min()["processes", 2]


def test_ctrl_c_in_the_parent_ends_all_workers(small, monkeypatch):
    def interrupted(*_, **__):
        monkeypatch.undo()  # it comes once
        raise KeyboardInterrupt

    with strategies.session():
        run(small, make(small, 1), {})
        monkeypatch.setattr(server._Traffic, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small, make(small, 2), {"workers": 1})
        assert not workers_left()


SCRIPT = """
import signal, sys
from llmperf import models, strategies
import llmperf.strategies.served
from llmperf.decoding import requests as workload
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `&`
model = models.load(sys.argv[1], dtype="fp32", device="cpu")
work = workload.build(model.tokenizer, 1, 8, 3)
with strategies.session():
    print(strategies.STRATEGIES["processes"](model, work, {"weights": "shared"}).output_tokens)
    print(strategies.served._kept[0].pids(), flush=True)
    work = workload.build(model.tokenizer, 1, 8, 4000)
    strategies.STRATEGIES["processes"](model, work, {"weights": "shared"})
"""


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_script_without_a_main_guard_leaves_nothing_however_it_ends(folder, tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=llmperf.ROOT,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout.readline() == "3\n"
    (worker,) = map(psutil.Process, eval(parent.stdout.readline()))
    if how == signal.SIGINT:  # a terminal sends it to the whole group
        os.killpg(parent.pid, how)
    else:
        parent.kill()
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert parent.wait(10) != 0
    parent.stdout.close()
    assert not list(tmp_path.glob("llmperf-weights-*"))


@pytest.mark.slow
def test_workers_start_from_a_real_kernel(folder):
    """What a notebook defines cannot be imported by a worker, and need not be."""
    import nbformat
    from nbclient import NotebookClient

    cell = (
        "from llmperf import models\n"
        "from llmperf.decoding import requests as workload\n"
        "from llmperf.strategies import STRATEGIES\n"
        f"model = models.load({str(folder)!r}, dtype='fp32', device='cpu')\n"
        "work = workload.build(model.tokenizer, 1, 8, 5)\n"
        "trace = STRATEGIES['processes'](model, work, {})\n"
        "print(trace.digest() == STRATEGIES['sequential'](model, work, {}).digest())"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert notebook.cells[0].outputs[0].text == "True\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers is 0: it must be a whole number, at least 1"),
        ({"workers": -1}, "workers is -1"),
        ({"weights": "half"}, "weights is 'half': it must be own or shared"),
        ({"threads": 2}, "processes has no option 'threads': its options are workers, weights"),
    ],
)
def test_bad_options_are_one_clear_sentence(small, options, words):
    with pytest.raises(ValueError, match=words):
        strategies.check("processes", small, 4, options)


def test_shared_weights_are_refused_on_a_gpu(small):
    from dataclasses import replace

    with pytest.raises(ValueError, match="shared weights are for the cpu"):
        strategies.check("processes", replace(small, device="cuda:0"), 2, {"weights": "shared"})


def test_more_processes_than_memory_are_refused_with_the_arithmetic(small, monkeypatch):
    """Ten copies of 0.06 GiB and ten interpreters do not fit 1 GiB."""
    monkeypatch.setattr(predict, "free_and_held", lambda model: (2**30, 0))
    ten = Condition(small, "processes", 10)
    with pytest.raises(prediction.DoesNotFit, match="does not fit in 1.00 GiB"):
        prediction.check_fits(ten)
    prediction.check_fits(Condition(small, "processes", 2))


def test_quantised_weights_are_not_shared(small):
    model = replace(small, quantization="int8")
    with pytest.raises(ValueError, match="weights in int8 cannot be shared: leave weights at own"):
        strategies.STRATEGIES["processes"].check(model, 2, {"weights": "shared"})
