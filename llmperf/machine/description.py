"""Which machine is this: its description, a short name for it, and whether it is busy."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import platformdirs
import psutil

from llmperf.machine import gpu
from llmperf.machine.probes import PROBES, ask

BUSY_CPU_PERCENT = 20.0  # of all cores: if other programs use more, a measurement is disturbed
BUSY_GPU_PERCENT = 10.0
NVML_WINDOW_S = 1.0  # it averages over at most that long: wait until our own work has left it
SCHEMA = 2  # of kept measurements; 2: read from huge pages, as the weights are
KEY_PROBES = (
    "os", "cpu_model", "cores_logical", "cores_allowed", "cores_quota", "power_plan", "on_battery",
)  # fmt: skip
CPU_FAMILY = (
    r"epyc|xeon|ryzen(?: \w+ \d\w+)?|core ultra \w+|i[3579]-\w+|apple m\d+(?: pro| max| ultra)?"
)


def cache_dir() -> Path:
    """The user's cache folder for this kit: LLMPERF_CACHE, or the platform's place."""
    if chosen := os.environ.get("LLMPERF_CACHE"):
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("llmperf", appauthor=False, opinion=False)


def save_whole(file: Path, text: str) -> None:
    """Write a file of the cache whole or not at all: two processes may write at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def cached_measurement(kind: str, device: str, measured: Callable[[str], dict]) -> dict:
    """`measured(device)`, kept in the user's cache for this machine, driver and these versions.

    A result with a `warning` is measured again when the machine is idle; one with a `reason`, why
    it could not be measured, is not kept.
    """
    with contextlib.suppress(OSError, ValueError):
        digest, _, text = _kept_file(kind, device).read_text(encoding="utf-8").partition("\n")
        if digest == _sha256(text):  # else damaged, or written by others
            found = json.loads(text)
            if not found.get("warning") or busy(device):
                return found
    result = measured(device)
    if not result.get("reason"):
        store_measurement(kind, device, result)
    return result


def store_measurement(kind: str, device: str, result: dict) -> None:
    """Put a result into the user's cache. A read-only one costs time, not the answer."""
    text = json.dumps(result)
    with contextlib.suppress(OSError):
        save_whole(_kept_file(kind, device), f"{_sha256(text)}\n{text}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept_file(kind: str, device: str) -> Path:
    device = "cpu" if device == "cpu" else f"cuda:{gpu.index(device)}"
    key = {name: ask(PROBES[name])[0] for name in KEY_PROBES}
    key |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    key |= {"schema": SCHEMA, "device": device}
    key |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if device.startswith("cuda"):
        cards, _ = ask(PROBES["gpus"])
        names = ("name", "driver", "power_limit_w", "memory_total_bytes")
        key["cards"] = [[card[name] for name in names] for card in cards or []]
    digest = _sha256(json.dumps(key, sort_keys=True))[:12]
    return cache_dir() / kind / f"{device.replace(':', '-')}-{digest}.json"


def platform_word(device: str, system: str | None = None) -> str:
    """`cpu` there, else `windows`, `wsl2`, `macos` or `linux`; `system`: `os` of a description."""
    word = (system or PROBES["os"]()).lower()
    known = word if word in ("windows", "wsl2", "macos") else "linux"
    return "cpu" if device == "cpu" else known


def describe() -> dict:
    """This machine as flat values ready for JSON; `reasons` says why a value is None.

    `gpus` holds one dict a card; in `packages` None means not installed.
    """
    values, reasons = {}, {}
    for name, probe in PROBES.items():
        values[name], reason = ask(probe)
        if values[name] is None:
            reasons[name] = reason or "the system does not say"
    values["gpus"] = values["gpus"] or []
    return {**values, "reasons": reasons}


def _gpu_word(name: str | None) -> str:
    return " ".join(re.sub(r"\b(NVIDIA|GeForce|Tesla|GPU)\b", " ", name or "GPU").split())


def slug(env: dict) -> str:
    """A short name for captions and folders: `linux-2core-epyc`, `rtx-4090-wsl2`."""
    system = env["os"] or "unknown"
    if env["gpus"]:
        words = [_gpu_word(env["gpus"][0]["name"]), system]
    else:
        model = env["cpu_model"] or "cpu"  # its family, as people say: AMD EPYC 9354 → epyc
        family = re.search(CPU_FAMILY, model, re.I) or model.split()
        words = [system, f"{cores(env)}core", family[0]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def cores(env: dict) -> int:
    """Whole cores that this process may use: the least of cores, affinity and container quota."""
    limits = (env["cores_logical"], env["cores_allowed"], env["cores_quota"])
    return max(1, int(min(limit for limit in (*limits, os.cpu_count() or 1) if limit)))


@cache
def usable_cores() -> int:
    return cores({name: ask(PROBES[name])[0] for name in PROBES if name.startswith("cores_")})


def caption(env: dict) -> str:
    """One line under a plot: `AMD EPYC, 2 cores, Linux, torch 2.13, no GPU`."""
    count, torch = cores(env), (env["packages"] or {}).get("torch") or "?"
    words = [env["cpu_model"] or "unknown CPU", f"{count} core{'s' * (count > 1)}", env["os"]]
    words.append("torch " + ".".join(torch.split(".")[:2]))
    for card in env["gpus"][:1]:
        size = card["memory_total_bytes"]  # None where the card shares the computer's memory
        words.append(_gpu_word(card["name"]) + (f" {size / 2**30:.0f} GB" if size else ""))
        words += [card["driver"] and f"driver {card['driver']}", card["driver_model"]]
    return ", ".join([word for word in words if word] + ["no GPU"] * (not env["gpus"]))


def busy_warning(cpu_percent: float | None, gpus: list[dict], our_pids: set[int]) -> str | None:
    """Why a measurement now would be dirty, or None. `our_pids`: ours and our children's.

    A desktop under WDDM lists every window as a process of the card, so they do not count there.
    """
    found = []
    if cpu_percent is not None and cpu_percent > BUSY_CPU_PERCENT:
        found.append(f"other processes use {cpu_percent:.0f} % of the CPU")
    for card in gpus:
        if (card.get("utilization_percent") or 0) > BUSY_GPU_PERCENT:
            found.append(f"{card['name']} is {card['utilization_percent']} % busy before the run")
        others = [p for p in card.get("processes") or [] if p["pid"] not in our_pids]
        if others and card.get("driver_model") != "WDDM":
            found.append(f"{len(others)} other process(es) compute on {card['name']}")
    return "; ".join(found) or None


def busy(device: str = "cpu") -> str | None:
    """`busy_warning` right now, of the processor and of this device; takes 0.1 s, on a card 1.1 s.

    In a container NVML shows the host's process ids: when this process uses the card and is not
    among them, nothing is said of other processes.
    """
    me = psutil.Process()
    our_pids = {me.pid, *(child.pid for child in me.children(recursive=True))}
    cpu_percent, _ = ask(PROBES["cpu_others_percent"])
    if device == "cpu":
        return busy_warning(cpu_percent, [], our_pids)
    time.sleep(NVML_WINDOW_S)
    index = gpu.index(device)
    cards = [dict(card) for card in (ask(PROBES["gpus"])[0] or [])[index : index + 1]]
    if gpu.torch_in_use():
        for card in cards:
            if our_pids.isdisjoint(p["pid"] for p in card["processes"] or []):
                card["processes"] = None
    return busy_warning(cpu_percent, cards, our_pids)
