import getpass
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmperf import machine
from llmperf.machine import description, gpu, probe_text, run_tool

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_bytes().decode("utf-8")


def pairs(name: str) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t", 1)) for line in recorded(name).splitlines()]


# --- parsers on recorded outputs ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "text"), pairs("proc_version.txt"))
def test_linux_kind(kind, text):
    assert probe_text.linux_kind(text) == kind


@pytest.mark.parametrize(("plan", "text"), pairs("powercfg.txt"))
def test_power_plan_in_any_language(plan, text):
    assert probe_text.power_plan(text) == plan


def test_power_plan_of_an_error_text():
    assert probe_text.power_plan("Unable to perform operation.") is None


def test_registry():
    assert probe_text.registry_value(recorded("reg_hags_on.txt"), "HwSchMode") == 2
    assert probe_text.registry_value(recorded("reg_hags_on.txt"), "SchMode") is None
    assert probe_text.power_mode(recorded("reg_power_mode.txt")) == "best performance mode"
    name = probe_text.registry_value(recorded("reg_cpu.txt"), "ProcessorNameString")
    assert probe_text.cpu_name(name) == "12th Gen Intel Core i7-12700H"


def test_mac_power():
    assert probe_text.mac_power(recorded("pmset.txt")) == "low power"
    assert probe_text.mac_power(" lowpowermode         0\n") == "normal"
    assert probe_text.mac_power("nothing of the kind") is None


def test_cpuinfo():
    epyc = probe_text.proc_cpuinfo(recorded("cpuinfo_epyc.txt"))
    assert epyc["model"] == "AMD EPYC 9354"
    assert epyc["virtual"] is True
    assert {"avx512f", "avx512_bf16"} <= set(epyc["isa"])
    arm = probe_text.proc_cpuinfo(recorded("cpuinfo_arm.txt"))
    assert arm == {
        "model": None,
        "isa": ["asimd", "asimddp", "sve", "bf16", "i8mm"],
        "virtual": False,
    }


def test_cache_size_and_quota():
    assert probe_text.cache_size("32768K\n") == 32 << 20
    assert probe_text.cpu_max_cores("150000 100000\n") == 1.5
    assert probe_text.cpu_max_cores("max 100000\n") is None


@pytest.mark.parametrize(
    ("kind", "cgroup", "files", "variables"),
    [
        (None, "0::/user.slice/session-2.scope", set(), {}),
        ("docker", "12:cpu:/docker/0123456789ab", set(), {}),
        ("docker", "0::/", {"/.dockerenv"}, {}),
        ("podman", "0::/", {"/run/.containerenv"}, {}),
        ("kubernetes", "0::/kubepods/besteffort/pod1", {"/.dockerenv"}, {}),
        ("lxc", "0::/", set(), {"container": "lxc"}),
    ],
)
def test_container_kind(kind, cgroup, files, variables):
    assert probe_text.container_kind(cgroup, files, variables) == kind


MIB = 1 << 20


def query(monkeypatch, text):
    """The cards that an nvidia-smi with this output lists."""
    monkeypatch.setattr(gpu, "run_tool", lambda *command: text)
    return gpu.queried("nvidia-smi")


A2000 = "0, NVIDIA RTX A2000 Laptop GPU, 537.58, WDDM, 4096, 548, 3548, [N/A], 0\n"
A10G = "0, NVIDIA A10G, 535.247.01, [N/A], 23028, 8722, 14306, 300.00, 0\n"


def test_the_query_of_nvidia_smi(monkeypatch):
    (card,) = query(monkeypatch, A2000)
    assert (card["name"], card["driver"]) == ("NVIDIA RTX A2000 Laptop GPU", "537.58")
    assert (card["index"], card["driver_model"], card["utilization_percent"]) == (0, "WDDM", 0)
    assert (card["memory_total_bytes"], card["memory_used_bytes"]) == (4096 * MIB, 548 * MIB)
    assert card["power_limit_w"] is None
    assert set(gpu.FIELDS) <= set(card)
    assert all(card["reasons"][k] for k in gpu.FIELDS if card[k] is None)
    two = query(monkeypatch, A10G + A10G.replace("0,", "1,", 1))
    assert [c["index"] for c in two] == [0, 1]
    assert two[0]["power_limit_w"] == 300 and two[0]["driver_model"] is None
    with pytest.raises(run_tool.Unknown, match="names no card"):
        query(monkeypatch, "NVIDIA-SMI has failed because it could not talk to the driver.")


# --- NVML, played by a stand-in ------------------------------------------------------------------


class FakeError(Exception):
    pass


class FakeNvml:
    """Answers a few queries; everything else is Not Supported, as under WSL2 or vGPU."""

    NVMLError = FakeError
    nvmlMemory_v2 = 2
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, v2=True):
        self.v2 = v2

    def __getattr__(self, name):
        def query(*args, **kwargs):
            raise FakeError("Not Supported")

        return query

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA GeForce RTX 4090"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 12040

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if version and not self.v2:
            raise FakeError("Function Not Found")
        reserved = 300 if version else 0
        return SimpleNamespace(total=1000, free=600, used=400 - reserved, reserved=reserved)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 450000

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=7, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return [SimpleNamespace(pid=7, usedGpuMemory=None)]

    def nvmlSystemGetProcessName(self, pid):
        return rb"C:\Users\somebody\game.exe"

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return f"uuid {uuid}"


def test_card_gives_a_value_or_a_reason_for_every_field():
    card = gpu.card(FakeNvml(), None)
    assert card["name"] == "NVIDIA GeForce RTX 4090"
    assert card["cuda"] == "12.4"
    assert card["power_limit_w"] == 450
    assert card["memory_reserved_bytes"] == 300
    assert card["processes"] == [{"pid": 7, "type": "C+G", "used_bytes": None, "name": "game.exe"}]
    assert card["pcie_gen"] is None
    assert "Not Supported" in card["reasons"]["pcie_gen"]
    assert {k for k in gpu.FIELDS if card[k] is None} == set(card["reasons"])


def test_memory_falls_back_to_version_1_without_inventing_a_reserve():
    card = gpu.card(FakeNvml(v2=False), None)
    assert card["memory_reserved_bytes"] is None
    assert card["memory_used_bytes"] == 400
    assert "version 1" in card["reasons"]["memory_reserved_bytes"]


@pytest.mark.parametrize(
    ("visible", "device", "handle"),
    [
        ("", "cuda", "index 0"),
        ("", "cuda:1", "index 1"),
        ("2,0", "cuda:0", "index 2"),
        ("2,0", "cuda:1", "index 0"),
        ("GPU-abc", "cuda:0", "uuid GPU-abc"),
    ],
)
def test_nvml_handle_follows_the_visible_devices(monkeypatch, visible, device, handle):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.nvml_handle(FakeNvml(), device) == handle


def test_nvml_handle_of_a_hidden_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        gpu.nvml_handle(FakeNvml(), "cuda:1")


# --- asking --------------------------------------------------------------------------------------


def test_ask_never_raises_and_never_hangs():
    assert run_tool.ask(lambda: 3) == (3, None)
    value, reason = run_tool.ask(lambda: 1 / 0)
    assert value is None and "ZeroDivisionError" in reason
    value, reason = run_tool.ask(lambda: time.sleep(5), timeout_s=0.05)
    assert value is None and "0.05 s" in reason


def test_a_reason_holds_no_path():
    secret = str(Path.home() / "secret")
    _, reason = run_tool.ask(lambda: Path(secret).read_text())
    assert secret not in reason and "No such file" in reason

    def failing():
        raise RuntimeError(secret)

    assert secret not in run_tool.ask(failing)[1]


def test_run_tool_says_why():
    assert run_tool.run_tool(sys.executable, "-c", "print('ä')").strip()
    with pytest.raises(run_tool.Unknown, match="search path"):
        run_tool.run_tool("no-such-program-anywhere")
    with pytest.raises(run_tool.Unknown, match="exit status 3"):
        run_tool.run_tool(sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(run_tool.Unknown, match="no answer within"):
        run_tool.run_tool(sys.executable, "-c", "import time; time.sleep(9)", timeout_s=0.2)


# --- the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env():
    return machine.describe()


def test_describe_is_json_and_every_none_has_a_reason(env):
    assert json.loads(json.dumps(env)) == env
    assert set(env) == set(machine.PROBES) | {"reasons"}
    unanswered = {name for name in machine.PROBES if env[name] is None}
    assert unanswered <= set(env["reasons"])
    assert all(env["reasons"].values())
    assert env["gpus"] or env["reasons"]["gpus"]
    assert env["ram_total_bytes"] >= env["ram_available_bytes"] > 0
    assert env["packages"]["torch"]


def test_describe_names_nobody(env):
    text = json.dumps(env)
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), sys.prefix):
        if len(private) > 3:
            assert private not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def test_describe_survives_probes_that_fail_or_hang(monkeypatch):
    def broken():
        raise KeyError("nobody foresaw this")

    monkeypatch.setitem(machine.PROBES, "power_plan", broken)
    monkeypatch.setitem(machine.PROBES, "gpus", lambda: time.sleep(9))
    monkeypatch.setitem(description.SLOW_S, "gpus", 0.05)
    env = machine.describe()
    assert env["power_plan"] is None and "KeyError" in env["reasons"]["power_plan"]
    assert env["gpus"] == [] and "no answer" in env["reasons"]["gpus"]
    assert env["os"]


def test_describing_a_machine_imports_no_torch():
    code = "import sys; from llmperf.machine import describe, gpu, overhead;"
    code += " sys.exit('torch' in sys.modules)"
    root = Path(machine.__file__).parent.parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}
        ).returncode
        == 0
    )


def made_up(**changes) -> dict:
    env = {
        "os": "Linux",
        "cpu_model": "AMD EPYC 9354",
        "cores_logical": 2,
        "cores_allowed": 2,
        "cores_quota": None,
        "gpus": [],
        "packages": {"torch": "2.13.0+cpu"},
    }
    return {**env, **changes}


def test_slug_and_caption(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.slug(made_up()) == "linux-2core-epyc"
    assert machine.caption(made_up()) == "AMD EPYC 9354, 2 cores, Linux, torch 2.13, no GPU"
    card = {"name": "NVIDIA GeForce RTX 4090", "driver": "560.94", "driver_model": "WDDM"}
    card["memory_total_bytes"] = 24564 * MIB
    windows = made_up(os="Windows", gpus=[card], cores_logical=32, cores_allowed=32)
    assert machine.slug(windows) == "rtx-4090-windows"
    assert machine.caption(windows) == (
        "AMD EPYC 9354, 32 cores, Windows, torch 2.13, RTX 4090 24 GB, driver 560.94, WDDM"
    )
    card = card | {"name": "NVIDIA GeForce RTX 3060 Ti"}
    assert machine.slug(made_up(os="WSL2", gpus=[card])) == "rtx-3060-ti-wsl2"
    assert machine.slug(made_up(cpu_model="Apple M2 Pro", os="macOS", cores_allowed=None)) == (
        "macos-2core-apple-m2-pro"
    )
    assert machine.slug(made_up(cpu_model=None, os=None)) == "unknown-2core-cpu"


def test_cores_respects_the_quota_of_a_container(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.cores(made_up(cores_logical=64, cores_allowed=64, cores_quota=1.5)) == 1
    assert machine.cores(made_up(cores_logical=64, cores_allowed=8)) == 8


def test_busy_warning():
    process = {"pid": 3402470, "type": "C"}
    linux = {"name": "NVIDIA A10G", "processes": [process]}
    desktop = {"driver_model": "WDDM", "processes": [process | {"type": "C+G"}]}
    shared = {"name": "NVIDIA GeForce RTX 3060 Ti", "utilization_percent": 28}
    assert machine.busy_warning(5.0, [], set()) is None
    assert "54 % of the CPU" in machine.busy_warning(54.0, [], set())
    assert "compute on NVIDIA A10G" in machine.busy_warning(0.0, [linux], set())
    assert machine.busy_warning(0.0, [linux], {3402470}) is None
    assert machine.busy_warning(0.0, [desktop], set()) is None
    assert "28 % busy" in machine.busy_warning(None, [shared], set())


def test_cpu_others_does_not_count_ourselves(monkeypatch):
    """Of two cores over one second, one was idle and we used half of the other."""
    from llmperf.machine import probes

    ticks = iter([SimpleNamespace(idle=100.0), SimpleNamespace(idle=101.0)])
    own, clock = iter([3.0, 3.5]), iter([10.0, 11.0])
    monkeypatch.setattr(probes.psutil, "cpu_times", lambda: next(ticks))
    monkeypatch.setattr(probes.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(probes, "_our_cpu_s", lambda: next(own))
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(probes.time, "sleep", lambda s: None)
    assert probes.cpu_others_percent() == 25.0


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    assert machine.cache_dir() == tmp_path
    monkeypatch.delenv("LLMPERF_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert machine.cache_dir() == tmp_path / "x" / "llmperf"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "w"))
    assert machine.cache_dir() == tmp_path / "w" / "llmperf"


@pytest.mark.gpu
def test_a_real_card_is_described(env):
    if not env["gpus"]:
        pytest.skip(env["reasons"]["gpus"])
    card = env["gpus"][0]
    assert card["name"] and card["driver"] and card["cuda"]
    assert 0 < card["memory_used_bytes"] < card["memory_total_bytes"]


def test_one_word_for_a_platform():
    words = {"Windows": "windows", "WSL2": "wsl2", "macOS": "macos", "Linux": "linux"}
    words |= {"WSL1": "linux"}
    assert {system: machine.platform_word("cuda:0", system) for system in words} == words
    assert machine.platform_word("cpu", "Windows") == "cpu"
