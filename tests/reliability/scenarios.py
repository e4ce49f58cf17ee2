"""What can go wrong with a study or a server, done many times at random moments.

Each scenario takes how often, a seed and a folder. It returns what it saw in a few words, and
raises AssertionError when something was lost, doubled or let in.
"""

import asyncio
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import engines
import hostile
import hypothesis
import psutil
import pynvml
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from tiny_models import save_llama

from llmperf import REFERENCE, findings, machine, models, strategies
from llmperf.decoding.requests import Request, Workload, build
from llmperf.findings import published
from llmperf.machine import probes
from llmperf.measure import records
from llmperf.memory.probe import ChannelReader
from llmperf.strategies import Server
from llmperf.strategies.endpoint import read_chunks
from llmperf.study import profile


class Study:
    """A study of a notebook on a tiny model, run once undisturbed; and again, to be disturbed."""

    def __init__(self, kernel: bool):
        """Notebook 03 without Jupyter; with `kernel` notebook 06 as papermill runs it."""
        self._scratch = tempfile.TemporaryDirectory()
        self.folder, self.kernel = Path(self._scratch.name), kernel
        model = str(save_llama(self.folder / "tiny"))
        parameters = {"model": model, "dtype": "fp32", "device": "cpu"}
        lengths = {"prompt_tokens": 8, "new_tokens": 64, "repeats": 3}
        steps = {"03-batch": {"batch_sizes": [1, 2, 3], **lengths}}
        if kernel:
            steps = {"06-processes": {"processes": [1, 2], **lengths}}
        text = yaml.safe_dump({"parameters": parameters, "notebooks": steps})
        (self.folder / "study.yaml").write_text(text, encoding="utf-8")
        began = time.monotonic()
        assert self.run("whole").wait() == 0, self.said("whole")
        self.seconds = time.monotonic() - began
        self.whole = self.read("whole")

    def run(self, name: str, *, resume=False, **how) -> subprocess.Popen:
        out = self.folder / name
        ask = (
            ["--resume", out] if resume else ["--profile", self.folder / "study.yaml", "--out", out]
        )
        ask += [] if resume else ["--only", "06" if self.kernel else "03"]
        ask += [] if self.kernel else ["--no-notebooks"]
        command = [sys.executable, "-m", "llmperf", "run", *map(str, ask)]
        with (self.folder / f"{name}.log").open("a", encoding="utf-8") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, **how)

    def said(self, name: str) -> str:
        """The last words of the runs of this name."""
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8").splitlines()
        return " | ".join(lines[-6:])

    def store(self, name: str) -> Path:
        return self.folder / name / "records.jsonl"

    def read(self, name: str) -> list:
        path = self.store(name)
        found = records.scan(path)[0] if path.exists() else []
        found = [r for r in found if r.kind != "failed"]  # measured again
        return sorted(f"{r.kind} {r.status} {r.reason} {r.repeat} {r.key}" for r in found)

    def finish(self, name: str) -> None:
        """Resume, and compare with the undisturbed study; what was measured stays as it was."""
        before = self.store(name).read_bytes() if self.store(name).exists() else b""
        started = (self.folder / name / "run.yaml").exists()
        ended = self.run(name, resume=started).wait(300)
        assert ended == 0, f"{name} ended with {ended}: {self.said(name)}"
        kept = before[: before.rfind(b"\n") + 1]
        assert self.store(name).read_bytes().startswith(kept), f"{name} changed its records"
        found = Counter(self.read(name))
        found.subtract(self.whole)
        differs = {record: n for record, n in found.items() if n}
        assert not differs, f"{name} lost (-) or doubled (+) records: {differs}"


study_of = cache(Study)  # what is undisturbed serves every scenario


def killed_studies(count: int, seed: int, folder: Path) -> str:
    """SIGKILL of the study or of a process of it at a random moment, then `--resume`."""
    dice, hit = random.Random(seed), Counter()
    for i in range(count):
        study, name = study_of(i % 2 == 1), f"killed-{seed}-{i}"
        running = study.run(name)
        wanted = dice.choice(("study", *PROCESSES)) if study.kernel else "study"
        victims = [psutil.Process(running.pid)]
        if wanted != "study":  # processes that come late
            while running.poll() is None and not (victims := _processes(running.pid, wanted)):
                time.sleep(0.01)
        time.sleep(dice.uniform(0.1, study.seconds / (1 if wanted == "study" else 6)))
        if running.poll() is None and victims and (victim := dice.choice(victims)).is_running():
            hit[wanted] += 1
            children = _children(running.pid)
            victim.kill()
            running.wait(300)
            assert not psutil.wait_procs(children, timeout=20)[1], "a child is still running"
        running.wait(300)
        if study.store(name).exists() and dice.random() < 0.5:  # as a power cut would leave it
            with study.store(name).open("a", encoding="utf-8") as file:
                file.write('{"experiment": "03-batch", "torn')
        study.finish(name)
    words = ", ".join(f"{number} x {name}" for name, number in sorted(hit.items()))
    return f"killed: {words}; nothing lost or doubled"


PROCESSES = {"kernel": "ipykernel_launcher", "memory sampler": "llmperf.memory.probe",
             "inference process": "llmperf.strategies.inference"}  # fmt: skip


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _processes(pid: int, wanted: str) -> list[psutil.Process]:
    """The processes of a study that run this module."""
    found = []
    for child in _children(pid):
        with suppress(psutil.NoSuchProcess):
            found += [child] if PROCESSES[wanted] in child.cmdline() else []
    return found


def interrupted_studies(count: int, seed: int, folder: Path) -> str:
    """SIGINT or SIGTERM at a random moment: exit status 130 and nothing left running."""
    dice, study, seen = random.Random(seed), study_of(False), Counter()
    for i in range(count):
        name = f"interrupted-{seed}-{i}"
        running = study.run(name)
        while not (study.folder / name / "run.yaml").exists():
            time.sleep(0.01)
        time.sleep(dice.uniform(0.2, study.seconds))
        if running.poll() is None:
            children = _children(running.pid)
            running.send_signal(dice.choice((signal.SIGINT, signal.SIGTERM)))
            seen[running.wait(60)] += 1
            assert not psutil.wait_procs(children, timeout=20)[1], "a child is still running"
            assert set(seen) <= {130, 0}, f"exit statuses {dict(seen)}: {study.said(name)}"
        study.finish(name)
    return f"{seen[130]} interrupted, {seen[0]} had just ended; nothing lost or doubled"


def full_disks(count: int, seed: int, folder: Path) -> str:
    """Files may not grow beyond a random size, or the folder goes away; then all is well again."""
    import resource

    dice, study, failed = random.Random(seed), study_of(False), Counter()
    whole = study.store("whole").stat().st_size
    for i in range(count):
        name = f"full-{seed}-{i}"
        if i % 4 == 3:
            running = study.run(name)
            while running.poll() is None and not study.store(name).exists():
                time.sleep(0.01)
            time.sleep(dice.uniform(0, study.seconds / 10))
            shutil.rmtree(study.folder / name)
            failed["removed"] += running.wait(300) != 0
        else:
            most = dice.randrange(200, whole)
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
            failed["full"] += study.run(name, preexec_fn=limit).wait(300) != 0
        assert "Traceback" not in study.said(name), study.said(name)
        study.finish(name)
    words = ", ".join(f"{n} {word}" for word, n in sorted(failed.items()))
    return f"{failed.total()} of {count} stopped ({words}); all went on afterwards"


def random_requests(count: int, seed: int, folder: Path) -> str:
    """Runs of a server that come and go: arrivals, limits, cancels, deaths of a process."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(engines.__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    Serving.found, Serving.events = Counter(), Counter()
    how = settings(max_examples=5, stateful_step_count=20, deadline=None, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip
    with Server(engines.front(200_000), engine="engines:null") as Serving.server:
        while Serving.found.total() < count:
            run_state_machine_as_test(hypothesis.seed(seed)(Serving), settings=how)
            seed += 1
    found, events = (
        ", ".join(f"{number} {what}" for what, number in sorted(counter.items()))
        for counter in (Serving.found, Serving.events)
    )
    return f"one outcome each ({found}); {events}"


REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 30), st.floats(0, 0.1)), min_size=1, max_size=40
)  # prompt tokens, new tokens, arrival


class Cancelled(Exception):
    """Raised by whoever reads the tokens: the run ends there."""


class Serving(RuleBasedStateMachine):
    """A server as its user drives it. What may come of a request follows from what was done."""

    server: Server
    found: Counter
    events: Counter

    @rule(
        asked=REQUESTS,
        rows=st.integers(1, 8),
        batching=st.sampled_from(("groups", "slots")),
        processes=st.integers(1, 2),
        deadline_s=st.sampled_from((None, None, 0.002, 5.0)),
        max_queue=st.sampled_from((None, None, 1, 20)),
        concurrency=st.sampled_from((None, 1, 3)),
        event=st.sampled_from((None, None, None, "cancelled", "killed")),
        moment=st.integers(1, 60),
    )
    def run_some(self, asked, event, moment, **how):
        requests = [Request(i, (1,) * p, n, arrival_s=a) for i, (p, n, a) in enumerate(asked)]
        tokens = 0

        def on_token(id: int, token: int) -> None:
            nonlocal tokens
            tokens += 1
            if event and tokens == moment:
                self.events[event] += 1
                if event == "cancelled":
                    raise Cancelled
                psutil.Process(self.server.pids()[moment % how["processes"]]).kill()

        try:
            trace = self.server.run(Workload(tuple(requests)), on_token=on_token, **how)
        except Cancelled:
            return  # the next run shows that nothing of this one is left
        possible = {"ok"}
        possible |= {"expired"} if how["deadline_s"] else set()
        possible |= {"rejected"} if how["max_queue"] else set()
        possible |= {"error"} if event == "killed" and tokens >= moment else set()
        for wanted, row in zip(requests, trace.requests, strict=True):
            said = [engines.TEXT[i % len(engines.TEXT)] for i in range(len(row.tokens))]
            assert row.id == wanted.id and row.status in possible, (row.status, row.reason)
            assert list(row.tokens) == said, "tokens of another request"
            assert row.status != "ok" or len(row.tokens) == wanted.max_new_tokens
            assert row.status == "ok" or row.reason
            self.found[row.status] += 1

    @rule(which=st.integers(0, 1))
    def kill_an_idle_process(self, which):
        """It is replaced when the next run starts."""
        with suppress(IndexError, psutil.NoSuchProcess):  # there is one, or it is gone already
            victim = psutil.Process(self.server.pids()[which])
            victim.kill()
            psutil.wait_procs([victim], timeout=10)
            self.events["killed while idle"] += 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


# What NVML's functions give, each of them possibly an error.
UNSIGNED = st.sampled_from((0, 1, 2**32 - 1, 2**64 - 1)) | st.integers(0, 2**64 - 1)
NVML = st.fixed_dictionaries(
    {
        name: answer | st.integers(1, 999).map(pynvml.NVMLError)
        for name, answer in {
            "nvmlInit": st.just(None),
            "nvmlShutdown": st.just(None),
            "nvmlDeviceGetCount": st.integers(0, 3),
            "nvmlDeviceGetHandleByIndex": st.just("handle"),
            "nvmlDeviceGetName": st.text(max_size=40),
            "nvmlSystemGetDriverVersion": st.text(max_size=12),
            "nvmlDeviceGetCurrentDriverModel": UNSIGNED,
            "nvmlDeviceGetCudaComputeCapability": st.tuples(UNSIGNED, UNSIGNED),
            "nvmlDeviceGetMemoryInfo": st.builds(
                SimpleNamespace, total=UNSIGNED, used=UNSIGNED, free=UNSIGNED, reserved=UNSIGNED
            ),
            "nvmlDeviceGetEnforcedPowerLimit": UNSIGNED,
            "nvmlDeviceGetPowerUsage": UNSIGNED,
            "nvmlDeviceGetClockInfo": UNSIGNED,
            "nvmlDeviceGetMaxPcieLinkGeneration": UNSIGNED,
            "nvmlDeviceGetMaxPcieLinkWidth": UNSIGNED,
            "nvmlDeviceGetUtilizationRates": st.builds(SimpleNamespace, gpu=UNSIGNED),
            "nvmlDeviceGetComputeRunningProcesses": st.lists(
                st.builds(
                    SimpleNamespace,
                    pid=UNSIGNED | st.just(os.getpid()),
                    usedGpuMemory=st.none() | UNSIGNED,
                ),
                max_size=3,
            ),
        }.items()
    }
)


def _answering(answer):
    """A function of NVML that gives this answer, or fails with it."""

    def query(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return query


def random_inputs(count: int, seed: int, folder: Path) -> str:
    """Records, profiles, parameters, server answers, prompts, the published table, what the system
    and NVML say, of any form: read, or one sentence.

    Everything but ValueError is a fault.
    """
    whole = (findings.shipped_runs()[0] / "records.jsonl.gz").resolve()
    sample = json.loads(next(iter(_lines(whole))))
    tokenizer = models.byte_tokenizer()

    def record(value, key):
        path = folder / "records.jsonl"
        path.write_text(json.dumps({**sample, key: value}) + "\n", encoding="utf-8")
        records.scan(path)

    def parameters(value):
        profile.check_data(value, "a parameter")

    def text_of_profile(text):
        profile.read_yaml(text, "a profile")

    def prompt(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text

    def answer(body):
        async def read():
            async def stream():
                yield body

            return [chunk async for chunk in read_chunks(stream(), 8)]

        asyncio.run(read())

    def system(text):
        assert probes.linux_kind(text) in ("Linux", "WSL2")
        assert isinstance(probes.cpu_name(text), str)
        probes.cpu_max_cores(text)

    def command(text):
        with mock.patch.object(probes, "run_tool", lambda *_: text):
            for system in ("Windows", "WSL2"):
                with mock.patch.object(probes, "_os", lambda system=system: system):
                    for name in ("power_plan", "hags"):
                        value, reason = probes.ask(probes.PROBES[name])
                        assert "failed with" not in (reason or ""), (name, reason)
                        assert (value is None) == bool(reason), (name, value)

    def card(answers):
        with mock.patch.multiple(pynvml, **{name: _answering(a) for name, a in answers.items()}):
            cards, reason = machine.ask(machine.PROBES["gpus"])
            assert "failed with" not in (reason or ""), reason
            found = {**here, "gpus": cards or []}
            machine.busy_warning(0.0, found["gpus"], {7})
            watched = ChannelReader(os.getpid())
            json.dumps({**watched.fast(), **watched.reasons})
        assert machine.slug(json.loads(json.dumps(found))) and machine.caption(found)

    def table(row, column, text):
        lines = [list(line) for line in published_lines]
        lines[row][column] = text
        with (folder / "measurements.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
        with mock.patch.object(published, "REFERENCE", folder):
            published.groups("threads")
            published.allocated()
            published.published_records.__wrapped__()

    here = machine.describe()
    with (REFERENCE / "measurements.csv").open(encoding="utf-8", newline="") as file:
        published_lines = list(csv.reader(file))
    for name in ("process_vram", "gpu_specs"):
        shutil.copy(REFERENCE / f"{name}.csv", folder)
    cell = (st.integers(0, len(published_lines) - 1), st.integers(0, len(published_lines[0]) - 1))
    anything = st.text(max_size=60)
    safe = st.text(st.characters(blacklist_categories=("Cs",)), max_size=60)
    readers = (
        (record, (JSON, st.sampled_from(sorted(sample)))),
        (parameters, (JSON | st.binary() | st.tuples(st.integers()),)),
        (text_of_profile, (anything,)),
        (answer, (st.binary(max_size=200) | JSON.map(_event),)),
        (prompt, (safe,)),
        (system, (anything,)),
        (command, (anything | st.builds("({}) REG_DWORD 0x{}".format, anything, anything),)),
        (card, (NVML,)),
        (table, (*cell, safe | st.integers().map(str) | st.floats().map(str))),
    )
    for reader, inputs in readers:
        _fuzz(reader, inputs, max(1, count // len(readers)), seed)
    return "each was read, or refused with a sentence"


def _fuzz(reader, inputs, count: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @settings(max_examples=count, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.tuples(*inputs))
    def one(values):
        try:
            reader(*values)
        except ValueError as error:
            assert str(error).strip(), "an empty sentence"

    one()


def _event(value) -> bytes:
    """A value as an event of a streamed answer, or as its `choices`."""
    return b"".join(
        b"data: " + json.dumps(each).encode() + b"\n\n" for each in (value, {"choices": value})
    )


def _lines(path: Path):
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from file


def long_run(minutes: float, seed: int, folder: Path) -> str:
    """Strategies in random order for a while: memory, files, threads and processes do not grow.

    The last tenth is compared with the first one after a tenth of warming up.
    """
    dice, me = random.Random(seed), psutil.Process()
    model = models.load(str(save_llama(folder / "tiny")), dtype="fp32", device="cpu")
    names = ("sequential", "batch", "coroutine", "threads", "dynamic", "continuous", "processes")
    end, rounds = time.monotonic() + minutes * 60, []
    with strategies.session():  # processes stay between runs
        while time.monotonic() < end:
            began, tokens = time.perf_counter(), 0
            for name in dice.sample(names, len(names)):
                work = build(model.tokenizer, 3, 8, 16, seed=dice.randrange(1000))
                tokens += strategies.STRATEGIES[name](model, work, {}).output_tokens
            speed = tokens / (time.perf_counter() - began)
            time.sleep(0.1)  # a thread may be just ending
            state = (me.memory_info().rss, me.num_fds(), me.num_threads(), len(me.children()))
            rounds.append((speed, *state))
    tenth = max(1, len(rounds) // 10)
    first, last = rounds[tenth : 2 * tenth] or rounds[:1], rounds[-tenth:]
    speed, rss, files, threads, children = (
        sum(x[i] for x in last) / len(last) / max(1e-9, sum(x[i] for x in first) / len(first))
        if any(x[i] for x in first)
        else 1.0
        for i in range(5)
    )
    found = f"{len(rounds)} rounds; last tenth over first: speed {speed:.2f}, RSS {rss:.2f}, "
    found += f"files {files:.2f}, threads {threads:.2f}, children {children:.2f}"
    assert rss < 1.05 and files < 1.05 and threads < 1.05 and children <= 1.05, found
    return found


SCENARIOS = {
    f.__name__: f
    for f in (killed_studies, interrupted_studies, full_disks, random_requests, random_inputs,
              hostile.hostile_models, hostile.hostile_archives, hostile.hostile_reports, long_run)
}  # fmt: skip
