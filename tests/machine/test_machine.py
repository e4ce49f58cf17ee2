import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llmperf import machine
from llmperf.machine import description, gpu, probes

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / name).read_bytes().decode("utf-8")


def pairs(name: str) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t", 1)) for line in recorded(name).splitlines()]


# --- parsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "text"), pairs("proc_version.txt"))
def test_linux_kind(kind, text):
    assert probes.linux_kind(text) == kind.replace("WSL1", "Linux")


def test_power_plan_in_any_language(monkeypatch):
    monkeypatch.setattr(probes, "_os", lambda: "WSL2")
    for text, plan in (("GUID: 381b4222 (Ausbalanciert)\n", "Ausbalanciert"), ("no plan", None)):
        monkeypatch.setattr(probes, "run_tool", lambda *command, text=text: text)
        assert probes.ask(probes.PROBES["power_plan"])[0] == plan


def test_scheduling_by_the_card_as_the_registry_says(monkeypatch):
    monkeypatch.setattr(probes, "_os", lambda: "Windows")
    for text, hags in (("  HwSchMode  REG_DWORD  0x2\n", True), ("  REG_DWORD  0x1", False)):
        monkeypatch.setattr(probes, "run_tool", lambda *command, text=text: text)
        assert probes.ask(probes.PROBES["hags"])[0] is hags


@pytest.mark.parametrize(("name", "system"), [("hags", "Linux"), ("power_plan", "macOS")])
def test_what_belongs_to_windows_is_not_asked_elsewhere(monkeypatch, name, system):
    monkeypatch.setattr(probes, "_os", lambda: system)
    assert probes.ask(probes.PROBES[name]) == (None, f"{system} has none: it belongs to Windows")


def test_names_and_quotas():
    assert (
        probes.cpu_name("12th Gen Intel(R) Core(TM) i7-12700H") == "12th Gen Intel Core i7-12700H"
    )
    assert probes.cpu_name("AMD EPYC 9354 32-Core Processor") == "AMD EPYC 9354"
    assert probes.cpu_max_cores("150000 100000\n") == 1.5
    assert probes.cpu_max_cores("max 100000\n") is None


MIB = 1 << 20


# --- NVML, played by a stand-in ------------------------------------------------------------------


class FakeError(Exception):
    pass


class FakeNvml:
    """Answers a few queries; everything else is Not Supported, as under WSL2 or vGPU."""

    nvmlMemory_v2 = 2

    def __getattr__(self, name):
        def query(*args, **kwargs):
            raise FakeError("Not Supported")

        return query

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA GeForce RTX 4090"

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        return SimpleNamespace(total=1000, free=600, used=100, reserved=300)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 450000

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=7, usedGpuMemory=None)]

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return f"uuid {uuid}"


@pytest.fixture
def fake_nvml(monkeypatch):
    monkeypatch.setattr(gpu, "pynvml", FakeNvml())
    monkeypatch.setattr(gpu, "NVMLError", FakeError)


def test_cards_that_cannot_be_counted_have_a_reason(fake_nvml):
    gpu.pynvml.nvmlInit = gpu.pynvml.nvmlShutdown = lambda: None
    assert machine.ask(machine.PROBES["gpus"]) == (None, "NVML: Not Supported")


def test_card_gives_a_value_or_a_reason_for_every_field(fake_nvml):
    card = gpu.card(None)
    assert card["name"] == "NVIDIA GeForce RTX 4090"
    assert card["power_limit_w"] == 450
    assert card["memory_used_bytes"] == 100
    assert card["processes"] == [{"pid": 7, "used_bytes": None}]
    assert card["pcie_gen_max"] is None
    assert "Not Supported" in card["reasons"]["pcie_gen_max"]
    assert {k for k in gpu.FIELDS if card[k] is None} == set(card["reasons"])


@pytest.mark.parametrize(
    ("visible", "device", "handle"),
    [
        (None, "cuda", "index 0"),
        (None, "cuda:1", "index 1"),
        ("2,0", "cuda:0", "index 2"),
        ("2,0", "cuda:1", "index 0"),
        ("GPU-abc", "cuda:0", "uuid GPU-abc"),
    ],
)
def test_nvml_handle_follows_the_visible_devices(fake_nvml, monkeypatch, visible, device, handle):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu.pynvml.nvmlDeviceGetCount = lambda: 2
    assert gpu.nvml_handle(device) == handle


def test_nvml_handle_of_a_hidden_card(fake_nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="cuda:1 is not among the 1 cards"):
        gpu.nvml_handle("cuda:1")


def test_hidden_cards_are_not_described(fake_nvml, monkeypatch):
    gpu.pynvml.nvmlInit = gpu.pynvml.nvmlShutdown = lambda: None
    gpu.pynvml.nvmlDeviceGetName = lambda handle: handle
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [card["name"] for card in gpu.cards()] == ["index 1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine.describe()
    assert found["gpus"] == [] and "CUDA_VISIBLE_DEVICES hides it" in found["reasons"]["gpus"]


def test_cuda_counts_cards_as_nvml_does_whatever_the_user_says():
    code = "import llmperf, os; print(os.environ['CUDA_DEVICE_ORDER'])"
    env = {**os.environ, "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert said == "PCI_BUS_ID\n"


# --- asking --------------------------------------------------------------------------------------


def test_ask_never_raises_and_its_reason_holds_no_path():
    assert probes.ask(lambda: 3) == (3, None)
    value, reason = probes.ask(lambda: 1 / 0)
    assert value is None and "ZeroDivisionError" in reason
    secret = str(Path.home() / "secret")
    _, reason = probes.ask(lambda: Path(secret).read_text())
    assert secret not in reason and "FileNotFoundError" in reason


def test_run_tool_says_why(monkeypatch):
    assert probes.run_tool(sys.executable, "-c", "print('ä')").strip()
    with pytest.raises(machine.Unknown, match="search path"):
        probes.run_tool("no-such-program-anywhere")
    with pytest.raises(machine.Unknown, match="exit status 3"):
        probes.run_tool(sys.executable, "-c", "raise SystemExit(3)")
    monkeypatch.setattr(probes, "TOOL_S", 0.2)
    with pytest.raises(machine.Unknown, match="no answer"):
        probes.run_tool(sys.executable, "-c", "import time; time.sleep(9)")


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


def test_describe_survives_probes_that_fail(monkeypatch):
    def broken():
        raise KeyError("nobody foresaw this")

    monkeypatch.setitem(machine.PROBES, "power_plan", broken)
    monkeypatch.setitem(machine.PROBES, "gpus", broken)
    env = machine.describe()
    assert env["power_plan"] is None and "KeyError" in env["reasons"]["power_plan"]
    assert env["gpus"] == [] and "KeyError" in env["reasons"]["gpus"]
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
    silent = made_up(gpus=[card | {"memory_total_bytes": None, "driver": None}])
    assert machine.caption(silent).endswith("torch 2.13, RTX 4090, WDDM")
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


@pytest.mark.parametrize(("own_cores", "others"), [(0, 60), (0.5, 10), (1, 0), (-1, 60)])
def test_own_processes_are_no_other_programs(monkeypatch, own_cores, others):
    monkeypatch.setattr(probes.psutil, "cpu_count", lambda: 1)
    seconds = iter([10.0, 10.0 + own_cores * probes.BUSY_WINDOW_S])  # -1: a child has ended
    monkeypatch.setattr(probes.psutil, "cpu_percent", lambda window_s: 60.0)
    monkeypatch.setattr(probes, "_seconds", lambda _: next(seconds))
    found = probes.others_percent()
    assert found == pytest.approx(others)


def test_a_child_at_work_is_no_other_program(monkeypatch):
    worked = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", worked], **pipes) as child:

        def total(seconds):
            child.stdout.readline()
            return 100.0 * 0.4 / seconds / psutil.cpu_count()  # as much as the child at least

        monkeypatch.setattr(probes.psutil, "cpu_percent", total)
        found = probes.others_percent()
        child.communicate(b"\n")
    assert found == 0


def test_busy_warning():
    process = {"pid": 3402470}
    linux = {"name": "NVIDIA A10G", "processes": [process]}
    desktop = {"driver_model": "WDDM", "processes": [process]}
    shared = {"name": "NVIDIA GeForce RTX 3060 Ti", "utilization_percent": 28}
    assert machine.busy_warning(5.0, [], set()) is None
    assert "54 % of the CPU" in machine.busy_warning(54.0, [], set())
    assert "compute on NVIDIA A10G" in machine.busy_warning(0.0, [linux], set())
    assert machine.busy_warning(0.0, [linux], {3402470}) is None
    assert machine.busy_warning(0.0, [desktop], set()) is None
    assert "28 % busy" in machine.busy_warning(None, [shared], set())


@pytest.mark.parametrize(
    ("device", "in_use", "listed", "said"),
    [
        ("cpu", False, 9, None),
        ("cuda:0", False, 9, "1 other process"),
        ("cuda:1", False, 9, None),  # the other card is another matter
        ("cuda:0", True, 9, None),  # in a container: ours has an id of the host
    ],
)
def test_only_the_card_in_use_is_asked(monkeypatch, device, in_use, listed, said):
    cards = [{"name": "A10G", "processes": [{"pid": listed}]}, {"name": "A10G", "processes": []}]
    monkeypatch.setattr(description, "NVML_WINDOW_S", 0)
    monkeypatch.setitem(probes.PROBES, "gpus", lambda: cards)
    monkeypatch.setitem(probes.PROBES, "cpu_others_percent", lambda: 0.0)
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: in_use))
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = machine.busy(device)
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("most", "current", "stat", "free"),
    [("max", "5", "", None), ("1000", "900", "anon 1\ninactive_file 300\n", 400),
     ("1000", "1200", "", 0)],
)  # fmt: skip
def test_a_container_has_no_more_ram_than_it_may_use(
    tmp_path, monkeypatch, most, current, stat, free
):
    monkeypatch.setattr(probes, "CGROUP", tmp_path)
    for name, text in {"max": most, "current": current, "stat": stat}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    whole = psutil.virtual_memory().available
    found = probes.ram_available()
    assert found == free if free is not None else found == pytest.approx(whole, rel=0.1)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    assert machine.cache_dir() == tmp_path
    if sys.platform != "linux":
        pytest.skip("only there a variable moves the folder")
    monkeypatch.delenv("LLMPERF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert machine.cache_dir() == tmp_path / "x" / "llmperf"


@pytest.mark.gpu
def test_a_real_card_is_described(env):
    if not env["gpus"]:
        pytest.skip(env["reasons"]["gpus"])
    card = env["gpus"][0]
    assert card["name"] and card["driver"]
    assert 0 < card["memory_used_bytes"] < card["memory_total_bytes"]


def test_one_word_for_a_platform():
    words = {"Windows": "windows", "WSL2": "wsl2", "macOS": "macos", "Linux": "linux"}
    assert {system: machine.platform_word("cuda:0", system) for system in words} == words
    assert machine.platform_word("cpu", "Windows") == "cpu"
