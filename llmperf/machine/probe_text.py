"""What other programs print about a machine, read by pure functions: text in, plain values out.

No function here runs anything, so each is tested on outputs recorded on each platform.
"""

import re

POWER_PLANS = {  # powercfg translates the names, the identifiers stay
    "381b4222-f694-41f0-9685-ff5bb260df2e": "balanced",
    "8c5e7fda-e8bf-4a96-9a85-a6e23a8c635c": "high performance",
    "a1841308-3541-4fab-bc81-f71556f20b4a": "power saver",
    "e9a42b02-d5df-448d-aa00-03f14749eb61": "ultimate performance",
}
POWER_MODES = {  # the slider of Windows 10 and 11, laid over the plan
    "00000000-0000-0000-0000-000000000000": "balanced mode",
    "961cc777-2547-4f9d-8174-7d86181b8a7a": "best power efficiency mode",
    "3af9b8d9-7c97-431d-ad78-34a8bfea439f": "better performance mode",
    "ded574b5-45a0-4f42-8737-46345c09c238": "best performance mode",
}
# What decides how fast a matrix product of small types runs; the rest of the flags says little.
ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
             "amx_fp16", "asimd", "asimddp", "sve", "sve2", "bf16", "i8mm")  # fmt: skip
GUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def linux_kind(proc_version: str) -> str:
    """`WSL1`, `WSL2` or `Linux`, from /proc/version.

    WSL1 has no kernel of its own and writes `Microsoft` with a capital; the kernel of WSL2 is
    called `microsoft-standard`, from 5.10 on with `WSL2` behind.
    """
    release = proc_version.split("(")[0]
    if re.search(r"microsoft-standard|WSL2", release):
        return "WSL2"
    return "WSL1" if "Microsoft" in release else "Linux"


def container_kind(cgroup: str, files: set[str], variables: dict[str, str]) -> str | None:
    """Name of the container that we are in, or None.

    `cgroup` is /proc/1/cgroup, `files` holds those marker files that exist, `variables` is the
    environment. With cgroup v2 and a private namespace only the other two tell.
    """
    if "KUBERNETES_SERVICE_HOST" in variables or "kubepods" in cgroup:
        return "kubernetes"
    if "/.dockerenv" in files or "docker" in cgroup:
        return "docker"
    if "/run/.containerenv" in files or "libpod" in cgroup:
        return "podman"
    for name in ("lxc", "containerd"):
        if name in cgroup:
            return name
    return variables.get("container") or None


def cpu_max_cores(cpu_max: str) -> float | None:
    """Cores that cgroup v2 allows (`200000 100000` → 2.0); None for no limit (`max 100000`)."""
    quota, period = cpu_max.split()
    return None if quota == "max" else int(quota) / int(period)


def proc_cpuinfo(text: str) -> dict:
    """`model` (None when an ARM kernel is silent), `isa` flags, `virtual` from /proc/cpuinfo."""
    model = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    have = set(flags[1].split()) if flags else set()
    return {
        "model": cpu_name(model[1]) if model else None,
        "isa": [flag for flag in ISA_FLAGS if flag in have],
        "virtual": "hypervisor" in have,
    }


def cpu_name(brand: str) -> str:
    """The brand string without trade marks, clock and padding."""
    brand = re.sub(r"\((?:R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*$|\d+-Core", " ", brand, flags=re.I)
    return " ".join(brand.split())


def cache_size(text: str) -> int:
    """Bytes of a /sys cache `size` file: `32768K` → 33,554,432."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def registry_value(text: str, name: str) -> int | str | None:
    """A value of `reg query KEY /v NAME`; a REG_DWORD as int, None when it is not there."""
    found = re.search(rf"^\s+{re.escape(name)}\s+(REG_\w+)\s+(.*?)\s*$", text, re.M)
    if not found:
        return None
    return int(found[2], 16) if found[1] == "REG_DWORD" else found[2]


def power_plan(text: str) -> str | None:
    """The plan of `powercfg /getactivescheme`, in whatever language Windows speaks.

    A plan of the maker's own keeps the name in parentheses. None when no plan is named.
    """
    found = re.search(rf"({GUID})\s*(?:\((.*)\))?", text, re.I)
    if not found:
        return None
    return POWER_PLANS.get(found[1].lower()) or found[2] or "a plan without a name"


def power_mode(text: str) -> str | None:
    """The power mode from `reg query …PowerSchemes /v ActiveOverlayAcPowerScheme`, or None."""
    return POWER_MODES.get(str(registry_value(text, "ActiveOverlayAcPowerScheme")).lower())


def mac_power(text: str) -> str | None:
    """`low power` or `normal` from `pmset -g`, None when it has no such setting."""
    found = re.search(r"^\s*lowpowermode\s+(\d)", text, re.M)
    return None if not found else ("low power" if found[1] == "1" else "normal")


def program_name(path: str) -> str:
    """The file name of a path of either system: folders may carry a user's name."""
    return re.split(r"[/\\]", path.strip())[-1]
