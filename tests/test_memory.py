"""The sampler: what it sees, what it says it cannot see, and that it never outlives its parent."""

import math
import subprocess
import sys
import time

import psutil
import pytest

from llmperf.memory import CHANNELS, GPU_CHANNELS, Channel, Sampler, Window

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
context = sampler.window()
if {open}:
    context.__enter__()
print(sampler._process.pid, flush=True)
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
    found = window.summary()
    assert list(found) == list(CHANNELS)
    for name, channel in found.items():
        assert channel["unit"] == CHANNELS[name]
        if channel["status"] == "ok":
            assert channel["n"] and channel["min"] <= channel["mean"] <= channel["max"]
            assert "reason" not in channel
        else:
            assert len(channel["reason"]) > 10 and "max" not in channel, "never a silent 0"
    assert found["rss"]["status"] == "ok"


def test_without_a_gpu_its_channels_name_the_reason(sampler):
    try:
        import pynvml

        pynvml.nvmlInit()
        pytest.skip("there is an NVIDIA GPU here")
    except pynvml.NVMLError:
        pass
    with sampler.window() as window:
        pass
    for name in GPU_CHANNELS:
        assert window.channels[name].status.startswith("unavailable: no NVIDIA GPU to ask (")
    assert "CPU" in window.channels["allocated"].reason


def test_memory_that_the_parent_takes_shows(sampler):
    with sampler.window() as window:
        time.sleep(0.1)
        held = b"x" * (200 * MB)
        time.sleep(0.1)
    rss, uss = (window.summary()[name] for name in ("rss", "uss"))
    assert 190 * MB < rss["max"] - rss["first"] < 400 * MB
    assert 190 * MB < uss["last"] - uss["first"] < 400 * MB
    del held
    with sampler.window() as window:
        pass
    assert window.summary()["rss"]["max"] < rss["max"] - 150 * MB, "each window starts anew"


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what was freed that long")
def test_a_window_does_not_show_what_was_freed_before_it(sampler):
    """Blocks of 64 KB come from the heap; one at its end keeps the C library from shrinking it."""
    blocks = [bytearray(64_000) for _ in range(3_000)]
    last = blocks.pop()
    del blocks
    before = psutil.Process().memory_info().rss
    with sampler.window() as window:
        pass
    assert window.summary()["rss"]["max"] < before - 150 * MB
    assert len(last) == 64_000


def test_the_children_count_from_when_they_start_and_the_sampler_does_not(sampler):
    with sampler.window() as window:
        other = child(CHILD)
        assert other.stdout.readline().strip() == "ready"
        time.sleep(0.1)
    grown = window.summary()["rss"]
    assert 150 * MB < grown["last"] - grown["first"] < 250 * MB
    other.communicate()
    with sampler.window() as window:
        pass
    alone = window.summary()["rss"]["last"]
    assert abs(alone - psutil.Process().memory_info().rss) < 5 * MB, "the sampler is not in it"


def test_samples_are_timed_from_the_opening(sampler):
    with sampler.window() as window:
        time.sleep(0.2)
    times = [t for t, _ in window.channels["rss"].samples]
    assert times == sorted(times) and times[0] < 0.1 and times[-1] >= 0.15 and len(times) >= 4


@pytest.mark.parametrize("window_is_open", [False, True])
def test_it_ends_when_its_parent_is_killed(window_is_open):
    parent = child(PARENT.format(open=window_is_open))
    watching = psutil.Process(int(parent.stdout.readline()))
    assert watching.is_running()
    parent.kill()
    parent.communicate()
    gone, alive = psutil.wait_procs([watching], timeout=10)
    assert gone and not alive


def test_closing_ends_it_at_once_even_with_a_window_open():
    sampler = Sampler()
    process = sampler._process
    sampler.window().__enter__()
    process.stdin.close()
    assert process.wait(timeout=4) == 0  # `close` kills it after 5 s
    sampler.close()
    sampler.close()  # closing twice is no error


def test_a_dead_sampler_is_a_clear_error():
    sampler = Sampler()
    sampler._process.kill()
    sampler._process.wait()
    with pytest.raises((RuntimeError, OSError)):
        sampler.window().__enter__()
    sampler._process.stdout.close()


@pytest.mark.parametrize("interval_s", [0, -1.0, math.nan, math.inf])
def test_a_bad_interval_is_refused(interval_s):
    with pytest.raises(ValueError, match="interval_s is"):
        Sampler(interval_s=interval_s)


def test_a_summary_by_hand():
    channel = Channel("bytes", ((0.0, 10), (0.1, 40), (0.2, 25)))
    assert channel.status == "ok"
    assert channel.summary() == {
        "status": "ok", "unit": "bytes", "first": 10, "last": 25, "min": 10, "max": 40,
        "mean": 25.0, "n": 3,
    }  # fmt: skip
    missing = Channel("watts", reason="this card has no power meter")
    assert missing.status == "unavailable: this card has no power meter"
    window = Window({"rss": channel, "power": missing})
    assert window.summary()["rss"]["max"] == 40
    assert window.summary()["power"] == {
        "status": "unavailable", "reason": "this card has no power meter", "unit": "watts",
    }  # fmt: skip
