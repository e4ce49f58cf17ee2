"""The sampler: what it sees, what it cannot see, and that it ends with its parent."""

import os
import queue
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from llmperf.machine import gpu
from llmperf.memory import CHANNELS, GPU_CHANNELS, Sampler, summary
from llmperf.memory import probe as probe_file
from llmperf.memory import sampler as sampler_file
from llmperf.memory.probe import ChannelReader

MB = 10**6
CHILD = """
import sys
held = b"x" * 150_000_000
print("ready", flush=True)
sys.stdin.read()
"""
PARENT = """
import time
from llmperf.memory import Sampler
sampler = Sampler()
with sampler.window():
    print(sampler._child.pid, flush=True)
    time.sleep({open_s})
time.sleep(60)
"""


@pytest.fixture(scope="module")
def sampler():
    with Sampler() as sampler:
        yield sampler


def child(source: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_every_channel_is_there_and_unread_ones_say_why(sampler):
    with sampler.window() as window:
        time.sleep(0.05)
    found = window
    assert list(found) == list(CHANNELS)
    for name, channel in found.items():
        assert channel["unit"] == CHANNELS[name]
        if channel["status"] == "ok":
            assert channel["n"] and channel["min"] <= channel["mean"] <= channel["max"]
            assert "reason" not in channel
        else:
            assert len(channel["reason"]) > 10 and "max" not in channel, "never a silent 0"
    assert found["rss"]["status"] == "ok"


def test_a_run_on_the_processor_watches_no_card(sampler, monkeypatch):
    with sampler.window() as window:
        pass
    assert {window[name]["reason"] for name in GPU_CHANNELS} == {"the run is on the CPU"}
    assert "CPU" in window["allocated"]["reason"]
    nvml = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", nvml)
    assert "power" not in ChannelReader(os.getpid(), "cpu").fast() and not nvml.asked


def test_without_a_gpu_its_channels_name_the_reason(monkeypatch):
    def no_driver():
        raise gpu.NVMLError(gpu.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(gpu.pynvml, "nvmlInit", no_driver)
    reasons = ChannelReader(os.getpid(), "cuda:0").reasons
    assert all(reasons[name].startswith("no NVIDIA GPU to ask (") for name in GPU_CHANNELS)


def test_memory_that_the_parent_takes_shows(sampler):
    with sampler.window() as window:
        time.sleep(0.1)
        held = b"x" * (200 * MB)
        time.sleep(0.1)
    rss, uss = (window[name] for name in ("rss", "uss"))
    assert 190 * MB < rss["max"] - rss["first"] < 400 * MB
    assert 190 * MB < uss["last"] - uss["first"] < 400 * MB
    del held
    with sampler.window() as window:
        pass
    assert window["rss"]["max"] < rss["max"] - 150 * MB, "each window starts anew"


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what was freed that long")
def test_a_window_does_not_show_what_was_freed_before_it(sampler):
    """Blocks of 64 KB come from the heap; one at its end keeps the C library from shrinking it."""
    blocks = [bytearray(64_000) for _ in range(3_000)]
    last = blocks.pop()
    del blocks
    before = psutil.Process().memory_info().rss
    with sampler.window() as window:
        pass
    assert window["rss"]["max"] < before - 150 * MB
    assert len(last) == 64_000


def test_the_children_count_from_when_they_start_and_the_sampler_does_not(sampler):
    with sampler.window() as window:
        other = child(CHILD)
        assert other.stdout.readline().strip() == "ready"
        time.sleep(0.1)
    grown = window["rss"]
    assert 150 * MB < grown["last"] - grown["first"] < 250 * MB
    other.communicate()
    with sampler.window() as window:
        pass
    alone = window["rss"]["last"]
    assert abs(alone - psutil.Process().memory_info().rss) < 5 * MB, "the sampler is not in it"


PARENT_OF_A_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
child.communicate()
"""


def test_a_process_that_is_left_out_takes_its_children_with_it():
    """On Windows the worker is the child of the launcher in its virtual environment."""
    watched, launcher = ChannelReader(os.getpid()), child(PARENT_OF_A_CHILD)
    worker = int(launcher.stdout.readline())
    watched.without = set()  # but for this process, which here is the parent too
    watched.slow()
    assert {launcher.pid, worker} <= {p.pid for p in watched.tree}
    watched.without = {launcher.pid}
    watched.slow()
    assert not {launcher.pid, worker} & {p.pid for p in watched.tree}
    launcher.communicate("")


def test_it_samples_while_the_window_is_open(sampler):
    with sampler.window() as window:
        time.sleep(0.2)
    assert window["rss"]["n"] >= 4


@pytest.mark.parametrize("open_s", [0, 60], ids=["closed window", "open window"])
def test_it_ends_when_its_parent_is_killed(open_s):
    parent = child(PARENT.format(open_s=open_s))
    watching = psutil.Process(int(parent.stdout.readline()))
    assert watching.is_running()
    parent.kill()
    parent.communicate()
    gone, alive = psutil.wait_procs([watching], timeout=10)
    assert gone and not alive


def test_a_sampler_that_dies_costs_its_window_and_is_restarted():
    with Sampler() as sampler:
        with sampler.window() as window:
            psutil.Process(sampler._child.pid).kill()
        assert window["rss"]["reason"].startswith("the sampler died: ")
        assert list(window) == list(CHANNELS)
        first = sampler._child.pid
        with sampler.window() as window:
            pass
        assert window["rss"]["status"] == "ok" and sampler._child.pid != first


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_leaving_a_window_never_replaces_an_exception(kind):
    with Sampler() as sampler:
        for killed in (True, False):
            with pytest.raises(kind), sampler.window():
                if killed:
                    psutil.Process(sampler._child.pid).kill()
                raise kind
        with sampler.window() as window:  # the samples of the window before are not taken for its
            held = b"x" * (100 * MB)
        rss = window["rss"]
        assert rss["last"] - rss["first"] > 90 * MB
        del held


class FakeNvml:
    """NVML of one card: every third call fails; processes as given."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 0  # noqa: N815 - NVML's own name

    def __init__(self, listed=()):
        self.calls, self.listed, self.asked = 0, listed, []

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self.asked.append(index)
        return f"card {index}"

    def nvmlDeviceGetMemoryInfo(self, gpu, version):  # noqa: N802
        return SimpleNamespace(used=10)

    def nvmlDeviceGetUtilizationRates(self, gpu):  # noqa: N802
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetPowerUsage(self, gpu):  # noqa: N802
        self.calls += 1
        if self.calls % 3:
            raise self.NVMLError("GPU is lost for a moment")
        return 70_000

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):  # noqa: N802
        return self.listed


def gpu_probe(monkeypatch, listed=(), device="cuda:0"):
    nvml = FakeNvml(listed)
    monkeypatch.setattr(gpu, "pynvml", nvml)
    monkeypatch.setattr(gpu, "NVMLError", nvml.NVMLError)
    return ChannelReader(os.getpid(), device), nvml


@pytest.mark.parametrize(("visible", "card"), [("1,0", "card 0"), ("0,GPU-1", "GPU-1")])
def test_the_card_that_torch_means_is_watched(monkeypatch, visible, card):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_probe(monkeypatch, device="cuda:1")[0].card == card


def test_a_failing_call_does_not_silence_its_channel_for_good(monkeypatch):
    probe, _ = gpu_probe(monkeypatch)
    seen = [probe.fast().get("power") for _ in range(6)]
    assert seen == [None, None, 70.0] * 2 and probe.reasons["power"] == "GPU is lost for a moment"


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ((), "NVML lists no process of ours"),
        ([(1_000_000, 5)], "a container"),
        ([(os.getpid(), None)], "WDDM"),
        ([(os.getpid(), 7)], None),
    ],
)
def test_memory_of_a_process_that_is_not_listed_is_unavailable_and_never_zero(
    monkeypatch, listed, says
):
    listed = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in listed]
    probe, _ = gpu_probe(monkeypatch, listed)
    value = probe.fast().get("process_vram")
    if says:
        assert value is None and says in probe.reasons["process_vram"]
    else:
        assert value == 7


class FakePdh:
    """win32pdh with three processes on two cards; `fails`: its next query does."""

    PDH_FMT_LARGE = 0x400

    def __init__(self):
        self.fails, me = False, os.getpid()
        card, other = (f"luid_0x00000000_0x0000D3F{i}_phys_0" for i in (4, 5))
        self.usage = {
            "Dedicated Usage": {f"pid_{me}_{card}": 700, f"pid_{me}_{other}": 20, "pid_1_x": 5},
            "Shared Usage": {f"pid_{me}_{card}": 60, "pid_1_x": 7},
        }

    def OpenQuery(self):  # noqa: N802
        return 1

    def AddEnglishCounter(self, query, path):  # noqa: N802
        assert path.startswith("\\GPU Process Memory(*)\\")
        return path.rpartition("\\")[2]

    def CollectQueryData(self, query):  # noqa: N802
        if self.fails:
            raise OSError("no data")

    def GetFormattedCounterArray(self, counter, form):  # noqa: N802
        return self.usage[counter]


def test_windows_tells_what_nvml_does_not(monkeypatch):
    pdh = FakePdh()
    monkeypatch.setitem(sys.modules, "win32pdh", pdh)
    hidden = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]  # as under WDDM
    probe, nvml = gpu_probe(monkeypatch, hidden)
    values = probe.slow()
    assert (values["process_vram"], values["process_shared"]) == (720, 60)
    assert "process_vram" not in probe.fast()
    nvml.listed = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=9)]  # as under TCC
    assert probe.fast()["process_vram"] == 9
    pdh.fails = True
    assert "process_shared" not in probe.slow() and probe.reasons["process_shared"] == "no data"


def test_what_only_windows_counts_has_a_reason_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "win32pdh", None)
    probe, _ = gpu_probe(monkeypatch)
    assert "process_shared" not in probe.slow()
    assert "a performance counter of Windows" in probe.reasons["process_shared"]


def test_the_allocator_gives_what_was_there_its_peak_and_what_is_there_now(monkeypatch):
    names = ("allocated_bytes.all.current", "allocated_bytes.all.peak")
    names += ("reserved_bytes.all.current", "reserved_bytes.all.peak")
    stats = iter([(1, 9, 2, 20), (5, 8, 6, 30)])
    calls = []
    cuda = SimpleNamespace(
        empty_cache=lambda: calls.append("emptied"),
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        current_device=lambda: 0,
        memory_stats=lambda device: dict(zip(names, next(stats), strict=True)),
    )
    monkeypatch.setattr(sampler_file, "torch_in_use", lambda: SimpleNamespace(cuda=cuda))
    with Sampler() as sampler, sampler.window() as window:
        pass
    assert sampler._device == "cuda:0"
    seen = {n: [window[n][k] for k in ("first", "max", "last")] for n in ("allocated", "reserved")}
    assert seen == {"allocated": [1, 8, 5], "reserved": [2, 30, 6]}
    assert calls == ["emptied", "reset"]  # before the window: not what an earlier run reserved


def test_a_summary_by_hand():
    assert summary("rss", (10, 40, 25)) == {
        "status": "ok", "unit": "bytes", "first": 10, "last": 25, "min": 10, "max": 40,
        "mean": 25.0, "n": 3,
    }  # fmt: skip
    assert summary("power", (), "this card has no power meter") == {
        "status": "unavailable", "reason": "this card has no power meter", "unit": "watts",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "seen"), [([0.0, 0.2, 0.4, 0.9], None), ([0.0, 0.5, 1.2, 1.4, 2.0], 50.0)]
)
def test_utilisation_of_a_run_shorter_than_its_average_is_not_told(seconds, seen, monkeypatch):
    """NVML's figure of the first second is in part that of what ran before: 99 % here."""
    clock, inbox = iter(seconds), queue.Queue()
    now = [next(clock)]
    fake = SimpleNamespace(
        reasons={},
        slow=lambda: {"uss": 1},
        fast=lambda: {"rss": 1, "utilization": 99.0 if now[0] < 1 else 50.0},
    )

    def get(timeout):
        try:
            now[0] = next(clock)
        except StopIteration:
            return {}
        raise queue.Empty

    inbox.get = get
    monkeypatch.setattr(probe_file.time, "perf_counter", lambda: now[0])
    found = probe_file.sample(fake, 0.02, inbox, lambda: None)["utilization"]
    if seen is None:
        assert "shorter than the 1 s that NVML averages over" in found["reason"]
    else:
        assert found["min"] == found["max"] == seen
