"""One copy of a model's weights for several processes: a file that each of them maps.

The operating system keeps one copy of the file's pages in memory, whoever maps them, on every
platform; the unique set size of each process shows it. Nothing is written to the mapped pages.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from llmperf.models import LoadSpec, Model, shapes

WEIGHTS = "weights.safetensors"


def save(model: Model) -> Path:
    """Write the weights as they are in memory into a new temporary folder; give the folder."""
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="llmperf-weights-"))
    try:
        save_file(_tensors(model.module), folder / WEIGHTS)
        model.module.config.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def load(folder: Path, source: LoadSpec) -> Model:
    """The model over the mapped file. It has no tokenizer: requests are token ids."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    start = time.perf_counter()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):  # shapes without memory
        module = AutoModelForCausalLM.from_config(config)
    for name, tensor in load_file(folder / WEIGHTS).items():  # maps the file, copies nothing
        _put(module, name, tensor)
    module.tie_weights()
    module.eval().requires_grad_(False)
    shape = shapes.from_config(config.to_dict(), name=source.name)
    return Model(
        source.name,
        module,
        None,
        shape,
        source.dtype,
        source.device,
        source.weights,
        source.quantization,
        time.perf_counter() - start,
        source,
    )


def _tensors(module) -> dict:
    """Every parameter once (tied ones share a name), and every buffer, persistent or not."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().contiguous() for name, tensor in named}


def _put(module, name: str, tensor) -> None:
    import torch

    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
