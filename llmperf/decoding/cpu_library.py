"""The C source of the step, compiled once a machine and loaded."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import cffi
import torch

from llmperf.machine import PROBES, ask
from llmperf.machine.description import cache_dir, save_whole

SOURCE = Path(__file__).with_name("step") / "step.c"
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-std=c11")


ffi = cffi.FFI()
ffi.cdef(SOURCE.with_name("model.h").read_text(encoding="utf-8"))
ffi.cdef("""
    int64_t scratch_floats(const Model *, int32_t rows, int32_t length, int32_t threads);
    int run_step(const Model *, const Step *);
    void next_tokens(const float *logits, int32_t rows, int32_t vocabulary, const Sampling *,
                     const double *uniforms, int32_t *tokens);
""")


class Unsupported(ValueError):
    """This model, processor or machine cannot run the step in C; the message says why."""


@cache
def library():
    """The compiled step, from the user's cache or built now. Raises Unsupported."""
    compiler = _compiler()
    text = b"".join(p.read_bytes() for p in sorted(SOURCE.parent.glob("*.[ch]")))
    text += repr((compiler, FLAGS, platform.machine(), processor())).encode()
    ending = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    target = cache_dir() / "step" / (hashlib.sha256(text).hexdigest()[:16] + ending)
    try:
        if not _whole(target):
            _build(compiler, target)
        return ffi.dlopen(str(target))
    except OSError as error:
        raise Unsupported(f"the compiled step cannot be kept or loaded ({error})") from None


def _compiler() -> tuple[str, ...]:
    """$CC, else a C compiler on the search path, else zig's (the optional extra `compiler`).

    On Windows not gcc: it spills wide vectors to a stack that is not aligned for them (GCC PR
    54412), and the process dies.
    """
    if named := os.environ.get("CC"):
        return (named,) if shutil.which(named) else tuple(named.split())
    for name in ("clang",) if sys.platform == "win32" else ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc")
    raise Unsupported(
        "there is no C compiler: install clang (on Linux gcc does too), or"
        " pip install 'llmperf-study[compiler]'"
    )


def processor() -> str:
    """What `-march=native` depends on: the model, and on Linux the features that the kernel lists,
    which also tell ARM processors and virtual machines apart."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    features = re.search(r"^(?:flags|Features)\s*:.*$", text, re.M)
    found = (torch.backends.cpu.get_cpu_capability(), ask(PROBES["cpu_model"])[0])
    return repr((*found, features and features[0]))


def _whole(target: Path) -> bool:
    """Whether the library is the one that was built: loading half of one ends this process."""
    try:
        kept = target.with_suffix(".sha256").read_text(encoding="utf-8")
        return hashlib.sha256(target.read_bytes()).hexdigest() == kept
    except (OSError, ValueError):
        return False


def _build(compiler: tuple[str, ...], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.built")
    libraries = () if sys.platform == "win32" else ("-lm", "-lpthread", "-fPIC", "-D_GNU_SOURCE")
    command = [*compiler, *FLAGS, "-shared", "-o", str(part), str(SOURCE), *libraries]
    try:
        how = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
        # In an inference process a thread reads standard input, which would hold a child back that
        # inherits it (cpython#78961).
        how |= {"stdin": subprocess.DEVNULL, "timeout": 300}
        how["creationflags"] = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        done = subprocess.run(command, **how)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"the C compiler {compiler[0]} did not run ({error})") from None
    if done.returncode:
        first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
        raise Unsupported(f"the C compiler failed: {first.strip()[:200]}")
    try:
        save_whole(target.with_suffix(".sha256"), hashlib.sha256(part.read_bytes()).hexdigest())
        part.replace(target)  # whole or not at all, also when two processes build it
    except OSError:
        if not target.exists():  # on Windows one that is in use cannot be replaced
            raise
