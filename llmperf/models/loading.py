"""Load a preset, a hub id or a folder, with trained, embedded or random weights.

Only safetensors files and the embedded GGUF are read; code of a hub repository is never run.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from llmperf.machine import DTYPE_BYTES, DTYPES, GIB, cache_dir, first_line, no_cuda
from llmperf.machine.private_memory import copy_to_private_memory
from llmperf.machine.probes import ram_available
from llmperf.models import configs, embedded, quantize
from llmperf.models import quantization as words
from llmperf.models.embedded import ModelUnavailable
from llmperf.models.quantization import BNB, OURS
from llmperf.models.shape import ModelShape

EMBEDDED = embedded.NAME
_loaded: WeakKeyDictionary = WeakKeyDictionary()  # module → (shape, dtype, quantization), device
TOKENIZER_FILES = ["*.json", "*.model", "*.txt"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


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
    shape: ModelShape
    dtype: str  # fp32, bf16 or fp16
    device: str  # cpu or cuda:0
    weights: str  # trained or random
    quantization: str | None
    load_s: float
    source: LoadSpec

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def label(self) -> str:
        """For captions: the name, what was done to the weights, and whether they are random."""
        words = [self.name, self.quantization or self.dtype]
        return " ".join(words + ["(random weights)"] * (self.weights == "random"))


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "auto",
    quantization: str | None = None,
) -> Model:
    """Load a preset, any hub id, or a local folder.

    `dtype` auto is fp32 on the CPU and bf16 on a GPU. `weights` random builds the true shapes with
    seeded weights; auto takes trained weights where they can be had, else random. `quantization` is
    a word of `models.QUANTIZATIONS`, or None for what the checkpoint declares. Raises ValueError
    for unknown words and wrong tensors, ModelUnavailable when the model cannot be had.
    """
    spec, folder = _resolved(LoadSpec(name, dtype, device, weights, quantization))
    # compiled code is kept between processes; by default it goes to a temporary folder
    with suppress(OSError):
        (cache_dir() / "compiled").mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    start = time.perf_counter()
    words.check(quantization, spec.dtype, spec.device)
    shape = configs.shape_of(spec.name, name=name)  # raises for what is no decoder of a real size
    if not folder:
        spec = replace(spec, quantization=words.word_of_random(quantization, shape.quantization))
    _check_memory(spec, shape)
    if spec.device != "cpu":
        torch.cuda.set_device(spec.device)  # what asks for no card by name means this one
    try:
        module, word = _trained(folder, spec) if folder else _random(spec)
    except ImportError as error:
        raise ModelUnavailable(
            f"{name} needs a library that is not installed here ({first_line(error)}): install"
            " 'llmperf-study[bnb]' for bnb-8 and bnb-4, [awq] for awq and gptq, and for others the"
            " library that it names"
        ) from error
    module.eval().requires_grad_(False)
    if spec.device == "cpu":
        copy_to_private_memory(module)
    else:  # loading warms the allocator up with the model's size: give that back
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if spec.quantization == "none":  # stays in `spec`: another process must load the same
        shape = replace(shape, quantization=None)
    else:
        spec = replace(spec, quantization=word)
    _loaded[module] = (shape, spec.dtype, word), spec.device
    load_s = time.perf_counter() - start
    how = (spec.dtype, spec.device, spec.weights, word, load_s, spec)
    return Model(spec.name, module, _tokenizer(folder), shape, *how)


def _check_memory(spec: LoadSpec, shape: ModelShape) -> None:
    """Refuse what cannot be held, before the system ends this process for it."""
    how = words.scheme(spec.quantization or shape.quantization)
    bits = how.bits if how else 8 * DTYPE_BYTES[spec.dtype]
    least, cpu = shape.parameters() * bits // 8, spec.device == "cpu"
    free = ram_available() if cpu else torch.cuda.mem_get_info(spec.device)[0]
    if least > free:
        raise ValueError(
            f"{spec.name} takes at least {least / GIB:.1f} GiB with {bits} bits a weight, and"
            f" {free / GIB:.1f} GiB are free: choose a smaller model or fewer bits"
        )


def other_models(model: Model) -> list[tuple[ModelShape, str, str | None]]:
    """Shape, dtype and quantization of the other models that this process holds on its device."""
    others = (how for module, how in _loaded.items() if module is not model.module)
    return [sizes for sizes, device in others if device == model.device]


def tokenizer_of(name: str, weights: str = "auto"):
    """The tokenizer of a preset, hub id or local folder; of bytes where the weights are random. Of
    a hub id its files alone are fetched. Raises ValueError when it cannot be had."""
    if weights == "random" or name.lower() == EMBEDDED:
        return _tokenizer(None if weights == "random" else embedded.folder())
    known, folder = configs.preset(name), Path(name).expanduser()
    if known or name.count("/") == 1 and not folder.is_dir():
        files = known["hub_id"] if known else name, TOKENIZER_FILES
        if not (folder := configs.from_hub(*files, lambda x: [*x.glob("tokenizer*")])):
            raise ValueError(f"the tokenizer of {name} is neither here nor to be had from the hub")
    return _tokenizer(folder)


def _tokenizer(folder: Path | None):
    if not folder:
        return byte_tokenizer()
    try:
        # without trust_remote_code it would ask the user
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a damaged file raises is of any kind
        why = f"the tokenizer of {folder.name} cannot be loaded: {first_line(error)}"
        raise ValueError(why) from error


def _resolved(asked: LoadSpec) -> tuple[LoadSpec, Path | None]:
    """The spec without `auto`, and the folder of the trained weights; None for random ones."""
    if asked.dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {asked.dtype!r}: choose auto, {', '.join(DTYPES)}")
    if asked.weights not in configs.WEIGHTS:
        raise ValueError(f"unknown weights {asked.weights!r}: choose {', '.join(configs.WEIGHTS)}")
    device, dtype = _device(asked.device), asked.dtype
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    logging.disable_progress_bar()  # loading takes about a second
    logging.set_verbosity_error()
    folder = None if asked.weights == "random" else _folder(asked.name)
    if folder is None:
        configs.config_of(asked.name)  # raises for a name that is not known
        if asked.weights == "trained":
            raise ModelUnavailable(
                f"the weights of {asked.name!r} are neither here nor to be had from the hub (no"
                f" network, no such model, or only its first layers): use {EMBEDDED!r}, a local"
                " folder, or weights='random'"
            )
    weights = "trained" if folder else "random"
    return replace(asked, dtype=dtype, device=device, weights=weights), folder


def _device(device: str) -> str:
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: {no_cuda()}; or use cpu")
    return "cuda:0" if device == "cuda" else device


def _folder(name: str) -> Path | None:
    """A local folder with the model's safetensors files, or None."""
    if configs.SLICE.fullmatch(name):
        return None
    if name.lower() == EMBEDDED:
        return embedded.folder()
    known, path = configs.preset(name), Path(name).expanduser()
    if known is None and path.is_dir():
        return path if _weights_complete(path) else None
    hub_id = known["hub_id"] if known else name
    is_hub_id = hub_id.count("/") == 1
    return configs.from_hub(hub_id, HUB_FILES, _weights_complete) if is_hub_id else None


def _weights_complete(folder: Path) -> bool:
    """Whether a folder has safetensors files, and all of its index.

    Raises ValueError for other files in the index, and for an adapter, whose model is elsewhere.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder.name} holds an adapter: merge it into its model and save that")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        mapping = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        names = sorted({name.strip() for name in mapping.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index.name} of {folder.name} names no file for each tensor") from None
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"the index of {folder.name} names {name!r}: only .safetensors files in the same"
                " folder are opened"
            )
    return all((folder / name).is_file() for name in names)


def _trained(folder: Path, spec: LoadSpec):
    plain = configs.config_of(folder / "config.json")
    declared, dtype = configs.declared_word(plain), getattr(torch, DTYPES[spec.dtype])
    word = words.word_of_checkpoint(spec.quantization, declared)
    ours, how = word in OURS, {}  # ours: loaded as it is, then converted layer by layer
    if declared is None and "quantization_config" in plain:  # of compressed-tensors
        if word in BNB:
            raise ValueError(f"{word} cannot convert compressed weights: leave quantization None")
        compressed = {**plain["quantization_config"], "dequantize": True}
        plain = {**plain, "quantization_config": compressed}
    if declared is None and word in BNB:
        bits = {"load_in_8bit": word == "bnb-8", "load_in_4bit": word == "bnb-4"}
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        how["quantization_config"] = BitsAndBytesConfig(**bits)  # layer by layer while it loads
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=configs.as_object(plain),
            dtype=dtype,
            device_map=None if spec.device == "cpu" or ours else spec.device,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **how,  # a quantization_config of None would wipe what the checkpoint declares
        )
    except ImportError:
        raise
    except Exception as error:  # what damaged files raise is of any kind
        raise ValueError(f"{folder.name} cannot be loaded: {first_line(error)}") from error
    _check_tensors(folder.name, info)
    return quantize.quantize(module, word, spec.device) if ours else module, word


def _check_tensors(name: str, info: dict) -> None:
    wrong = {
        "lacks": info["missing_keys"],
        "has, unknown to the model,": info["unexpected_keys"],
        "has in another shape": [key[0] for key in info["mismatched_keys"]],
    }
    for what, keys in wrong.items():
        if keys:
            raise ValueError(
                f"the checkpoint {name} {what} {', '.join(sorted(keys)[:4])}: it would run on"
                f" random weights ({len(keys)} tensors); use a complete one, or weights='random'"
            )


def _random(spec: LoadSpec):
    """True shapes, seeded weights."""
    plain = dict(configs.config_of(spec.name))
    plain.pop("quantization_config", None)
    word = None if spec.quantization == "none" else spec.quantization
    config, dtype = configs.as_object(plain), getattr(torch, DTYPES[spec.dtype])
    return quantize.random_module(config, word, dtype, spec.device), word


def byte_tokenizer():
    """One token a byte of UTF-8 (ids 0 to 255) and an end token, for random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
