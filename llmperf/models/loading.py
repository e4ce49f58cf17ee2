"""Models: presets and loading, with trained, embedded or random weights.

Only safetensors files and the one embedded GGUF whose hash is checked are ever read; code that a
hub repository brings along is never run.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmperf.machine import cache_dir, pages
from llmperf.models import embedded, quantize, shapes
from llmperf.models.embedded import ModelUnavailable

if TYPE_CHECKING:
    import torch

EMBEDDED = embedded.NAME
HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "yi-6b-chat": "01-ai/Yi-6B-Chat",
    "yi-34b-chat": "01-ai/Yi-34B-Chat",
    "yi-34b-chat-4bits": "01-ai/Yi-34B-Chat-4bits",
}
PRESETS = (EMBEDDED, *HUB_IDS)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WEIGHTS = ("auto", "trained", "random")


@dataclass(frozen=True)
class LoadSpec:
    """All that another process needs to load the same model."""

    name: str
    dtype: str
    device: str
    weights: str
    quantization: str | None = None


@dataclass(frozen=True)
class Model:
    """A loaded model with what measurements say of it. `module` is in evaluation mode."""

    name: str
    module: Any
    tokenizer: Any
    shape: shapes.ModelShape
    dtype: str  # fp32, bf16 or fp16
    device: str  # cpu or cuda:0
    weights: str  # trained or random
    quantization: str | None
    load_s: float
    source: LoadSpec

    @property
    def torch_device(self) -> torch.device:
        """Where the module's inputs go."""
        import torch

        return torch.device(self.device)

    def label(self) -> str:
        """For captions: the name, what was done to the weights, and whether they are random."""
        parts = [self.name, self.quantization or self.dtype]
        return " ".join(parts + ["(random weights)"] * (self.weights == "random"))


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    quantization: str | None = None,
    seed: int = 0,
) -> Model:
    """Load a preset, any hub id, or a local folder.

    `dtype` auto is fp32 on the CPU and bf16 on a GPU. `weights` random builds the true shapes
    from a seed without a download; auto takes trained weights where they can be had, else random.
    `quantization` is a word of `quantize.WORDS`, or None for what the checkpoint declares.
    Raises ValueError for a word it does not know, ModelUnavailable when the model cannot be had.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}: choose {', '.join(WEIGHTS)}")
    if name not in PRESETS and "/" not in name and not Path(name).is_dir():
        raise ValueError(
            f"unknown model {name!r}: choose {', '.join(PRESETS)}, a hub id such as owner/model,"
            " or a local folder"
        )
    device = _device(device)
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    _quiet()
    # kept from run to run; unasked, transformers has torch choose a temporary folder while it loads
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    start = time.perf_counter()
    try:
        word = quantize.check(quantization, dtype, device)
        module, tokenizer, weights, quantization = _build(name, dtype, device, weights, word, seed)
    except quantize.Missing as error:
        raise ModelUnavailable(f"{name!r} cannot be had so: {error}") from error
    module.eval().requires_grad_(False)
    if device == "cpu":
        pages.own(module)
    else:
        _forget_loading()
    load_s = time.perf_counter() - start
    shape = shapes.from_config(module.config.to_dict(), name=name)
    source = LoadSpec(name, dtype, device, weights, quantization)
    return Model(
        name, module, tokenizer, shape, dtype, device, weights, quantization, load_s, source
    )


def _quiet() -> None:
    """Loading takes about a second: transformers' bars are noise in a notebook."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_spec(source: LoadSpec) -> Model:
    """Load again what `source` describes, in this process or another."""
    return load(source.name, source.dtype, source.device, source.weights, source.quantization)


def front(source: LoadSpec | str) -> Model:
    """A Model without its weights (`module` is None): what a process needs that only tokenises.

    The process that infers loads the same with `load_spec(front(...).source)`.
    """
    from transformers import AutoConfig, AutoTokenizer

    if isinstance(source, str):
        device = _device("auto")
        source = LoadSpec(source, "fp32" if device == "cpu" else "bf16", device, "auto")
    _quiet()
    folder = _folder(source.name, source.weights)
    if source.weights == "random" or folder is None:
        config, tokenizer, weights = random_config(source.name), byte_tokenizer(), "random"
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        weights = "trained"
    shape = shapes.from_config(config.to_dict(), name=source.name)
    found = replace(source, weights=weights)
    told = (source.dtype, source.device, weights, source.quantization)
    return Model(source.name, None, tokenizer, shape, *told, 0.0, found)


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: choose auto, cpu or cuda:0")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} needs a CUDA GPU and this torch sees none: use cpu")
    return "cuda:0" if device == "cuda" else device


def _forget_loading() -> None:
    """Loading warms the allocator up with the model's size; give that back before measuring."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _build(name, dtype, device, weights, quantization, seed):
    folder = _folder(name, weights)
    if weights == "random" or (weights == "auto" and folder is None):
        return _random(name, dtype, device, quantization, seed)
    if folder is None:
        raise ModelUnavailable(
            f"the weights of {name!r} are neither in the local cache nor to be had from the hub (no"
            f" network, or no such model): use {EMBEDDED!r}, a local folder, or weights='random'"
        )
    return _trained(folder, dtype, device, quantization)


def _folder(name: str, weights: str) -> str | None:
    """A local folder with the model's files, or None when it cannot be had."""
    if Path(name).is_dir():
        return name
    if weights == "random":
        return None
    if name == EMBEDDED:
        return str(embedded.folder())
    return _from_hub(HUB_IDS.get(name, name))


def _from_hub(hub_id: str) -> str | None:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return snapshot_download(hub_id, allow_patterns=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError):
        return None


def _trained(folder: str, dtype: str, device: str, word: str | None):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    declared = quantize.declared(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    word = _word_of_checkpoint(word, declared)
    ours = word in quantize.OURS  # loaded as it is, then converted layer by layer
    loading = None if declared else quantize.loading_config(word, dtype)
    module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, DTYPES[dtype]),
        device_map=None if device == "cpu" or ours else device,
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=loading,
    )
    if ours:
        module = quantize.quantize(module, word, device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return module, tokenizer, "trained", word


def _word_of_checkpoint(word: str | None, declared: str | None) -> str | None:
    """What to load a checkpoint with. Raises ValueError where it says otherwise, and Missing."""
    if declared is None and word in quantize.CHECKPOINT:
        raise ValueError(f"these weights are not quantised by {word}: leave quantization None")
    if declared is None:
        return None if word == "none" else word
    if word not in (None, declared):
        raise ValueError(f"these weights are quantised by {declared}: leave quantization None")
    if declared in (*quantize.BNB, *quantize.CHECKPOINT):
        quantize.require(declared)
    return declared


def _random(name: str, dtype: str, device: str, word: str | None, seed: int):
    """True shapes, seeded normal weights; made directly in `dtype` on `device`.

    A preset whose checkpoint is quantised gets random weights in 4 bit as well.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = random_config(name)
    if word in quantize.CHECKPOINT:
        raise ValueError(f"random weights cannot be in {word}: choose {', '.join(quantize.WORDS)}")
    if word is None and name in PRESETS and shapes.preset(name).quantization:
        word = quantize.check("bnb-4", dtype, device)
    if word not in (None, "none"):
        made = quantize.random_module(config, word, getattr(torch, DTYPES[dtype]), device, seed)
        return made, byte_tokenizer(), "random", word
    torch.manual_seed(seed)
    with torch.device(device):  # a folder's configuration may name another dtype
        module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[dtype]))
    return module, byte_tokenizer(), "random", None


def random_config(name: str):
    """The transformers configuration of a preset, from the table of true shapes, or of a folder."""
    from transformers import AutoConfig

    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    if name not in PRESETS:
        raise ModelUnavailable(
            f"random weights of {name!r} need its shapes: choose {', '.join(PRESETS)} or a folder"
            " with a config.json"
        )
    s = shapes.preset(name)
    if s.architecture == "GPT2LMHeadModel":
        return AutoConfig.for_model(
            "gpt2",
            n_embd=s.hidden,
            n_layer=s.layers,
            n_head=s.heads,
            vocab_size=s.vocab,
            n_positions=s.max_positions,
        )
    return AutoConfig.for_model(
        "llama",
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        intermediate_size=s.intermediate,
        vocab_size=s.vocab,
        max_position_embeddings=s.max_positions,
        tie_word_embeddings=s.tied_embeddings,
    )


def byte_tokenizer():
    """One token a byte of UTF-8 (ids 0 to 255) and an end token: random weights need no more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
