"""One way to run a child process: messages, last words, silence, and an end in every case."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmperf.machine import Child, ChildDied, child

ECHO = """
import os, subprocess, sys, time
from llmperf.machine.child import Parent

parent = Parent()
print("a library prints")
for message in parent.messages():
    if message.get("die"):
        print("first", file=sys.stderr); sys.exit("the last words")
    if message.get("hang"):
        time.sleep(600)
    if message.get("leave"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]); time.sleep(600)
    if message.get("talk"):
        sys.stderr.write("x" * 10_000_000); sys.stderr.flush()
    if message.get("listen"):
        parent.listen(lambda m: parent.send(heard=m)); parent.send(ready=True); time.sleep(600)
    parent.send(echo=message)
"""
PARENT = """
import sys, time
from llmperf.machine import Child
child = Child("echo_child")
child.ask(60, listen=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_child.py").write_text(ECHO, encoding="utf-8")
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before]))
    with Child("echo_child", name="echo") as started:
        yield started
    assert not psutil.pid_exists(started.pid)


def test_messages_go_both_ways_and_prints_do_not_disturb(echo):
    text = "Grüße 世界 \n {}"
    assert echo.ask(60, text=text)["echo"] == {"text": text}
    assert echo.ask(60, n=2) == {"echo": {"n": 2}}


def test_no_window_opens_on_windows(monkeypatch):
    asked = {}

    def popen(*_, **how):
        asked.update(how)
        raise OSError

    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(OSError):
        Child("anything")
    assert asked["creationflags"] == 0x08000000


def test_much_on_the_error_stream_blocks_nobody(echo):
    assert echo.ask(60, talk=True)["echo"] == {"talk": True}


def test_a_death_is_told_with_exit_code_and_last_words_as_often_as_asked(echo):
    for _ in range(2):
        with pytest.raises(ChildDied, match=r"the echo ended \(exit code 1\): the last words"):
            echo.ask(60, die=True)
    assert not echo.alive


def test_a_child_that_hangs_is_killed(echo):
    echo.ask(60, n=1)
    with pytest.raises(ChildDied, match="no answer within 0.3 s"):
        echo.ask(0.3, hang=True)
    assert not echo.alive


def test_a_grandchild_that_holds_the_pipes_holds_nobody_up(echo, monkeypatch):
    monkeypatch.setattr(child, "EXIT_S", 1.0)
    echo.ask(60, n=1)
    echo.send(leave=True)
    while not (grandchildren := psutil.Process(echo.pid).children()):
        time.sleep(0.02)
    start = time.monotonic()
    with pytest.raises(ChildDied, match="no answer within 0.3 s"):
        echo.receive(0.3)
    echo.end()
    assert time.monotonic() - start < 5
    grandchildren[0].kill()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_an_interrupt_is_for_the_parent_alone(echo):
    echo.ask(60, n=1)
    os.kill(echo.pid, signal.SIGINT)
    assert echo.ask(60, n=2)["echo"] == {"n": 2}
    assert os.getpgid(echo.pid) != os.getpgid(0)


def test_a_listening_child_that_sleeps_ends_with_its_input(echo):
    echo.ask(60, listen=True)
    assert echo.ask(60, n=1)["heard"] == {"n": 1}
    echo.end()
    assert echo.process.returncode == 0  # not killed


def test_a_killed_parent_takes_its_child_along(echo):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
