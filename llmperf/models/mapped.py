"""One copy of a model's weights for several processes: a file that each of them maps."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmperf.models.configs import shape_of
from llmperf.models.loading import LoadSpec, Model

WEIGHTS_FILE = "weights.safetensors"


def save(model: Model, folder: Path) -> None:
    """Write the weights as they are in memory into a folder."""
    named = [*model.module.named_parameters(), *model.module.named_buffers()]  # tied ones once
    save_file({k: t.detach().contiguous() for k, t in named}, folder / WEIGHTS_FILE)
    model.module.config.save_pretrained(folder)


def load(folder: Path, source: LoadSpec) -> Model:
    """The model over the mapped file. It has no tokenizer: requests are token ids."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):  # shapes without memory
        module = AutoModelForCausalLM.from_config(config)
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():  # maps the file, copies nothing
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        is_parameter = isinstance(getattr(owner, leaf), torch.nn.Parameter)
        setattr(owner, leaf, torch.nn.Parameter(tensor, False) if is_parameter else tensor)
    module.tie_weights()
    module.eval().requires_grad_(False)
    how = (source.dtype, source.device, source.weights, source.quantization)
    shape = shape_of(source.name, name=source.name)
    return Model(source.name, module, None, shape, *how, 0.0, source)
