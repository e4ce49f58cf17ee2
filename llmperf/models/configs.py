"""Find a model's configuration and its shape: preset, folder, config.json, hub id or mapping.

A shape is read from the module once (`meta`), then kept as JSON in the user's cache by the
configuration's hash, so that a prediction needs no torch.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from llmperf import DATA
from llmperf.machine import first_line
from llmperf.machine.description import cache_dir, save_whole
from llmperf.models import embedded
from llmperf.models.embedded import ModelUnavailable
from llmperf.models.shape import ModelShape, from_json

SCHEMA = 7  # of the kept shapes
FILES = {file.stem: file for file in sorted((DATA / "models").glob("*.json"))}
PRESETS = (embedded.NAME, *(name for name in FILES if name != embedded.NAME))
WEIGHTS = ("auto", "trained", "random")
MOST_LAYERS = 500  # the highest value accepted of a number whose key contains "layer"
LARGEST = 100_000_000  # the highest value accepted of any other integer, token ids left out
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # keys for their number
SLICE = re.compile(r"(.+):layers=(\d+)")  # the first layers of a model, which has random weights
HUB_S = 3.0  # the hub answers sooner, or there is no network


@lru_cache
def preset(name: str) -> dict | None:
    """The file of a preset, asked for by name or hub id: see data/models. None if unknown."""
    if file := FILES.get(name.lower()):
        return json.loads(file.read_text(encoding="utf-8"))
    ids = {preset(known)["hub_id"]: known for known in FILES} if name.count("/") == 1 else {}
    return preset(ids[name]) if name in ids else None


def config_of(source: str | Path) -> dict:
    """The configuration behind a preset, a folder (as ./gpt2), a config.json, or a hub id; of its
    first layers behind NAME:layers=N.

    Raises ModelUnavailable, naming what there is, when it cannot be had.
    """
    if asked := SLICE.fullmatch(str(source)):
        return _first_layers(config_of(asked[1]), int(asked[2]))
    if known := preset(str(source)):
        return known["config"]
    if file := _local_file(source):
        return _read_config(file)
    if str(source).count("/") != 1:
        raise ModelUnavailable(
            f"unknown model {str(source)!r}: choose {', '.join(PRESETS)}, a hub id such as"
            " owner/model, a local folder such as ./my-model, or a config.json"
        )
    found = from_hub(str(source), ["config.json"], lambda x: (x / "config.json").is_file())
    if found is None:
        raise ModelUnavailable(
            f"cannot fetch the config.json of {source}: download it once, give its file or folder,"
            f" or choose {', '.join(PRESETS)}"
        )
    return _read_config(found / "config.json")


def _first_layers(config: dict, count: int) -> dict:
    """The configuration with so many layers; lists with an entry for each layer are cut."""
    if "text_config" in config:
        return config | {"text_config": _first_layers(config["text_config"], count)}
    key = next((key for key in LAYERS if key in config), LAYERS[0])
    has = config[key] if key in config else as_object(config).num_hidden_layers
    if not 1 <= count <= has:
        raise ValueError(f"layers={count} cannot be taken: this model has {has}")
    cut = {k: v[:count] for k, v in config.items() if isinstance(v, list) and len(v) == has}
    return config | cut | {key: count}


def _local_file(source: str | Path) -> Path | None:
    path = Path(source).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return path if path.is_file() else None


def from_hub(hub_id: str, files: list[str], complete: Callable[[Path], object]) -> Path | None:
    """The folder with these files of a hub id, from the Hugging Face cache or the hub, or None."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for here in (True, False):
        with suppress(HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
            if here or hub_answers():
                folder = snapshot_download(hub_id, allow_patterns=files, local_files_only=here)
                if complete(Path(folder)):
                    return Path(folder)
    return None


@lru_cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once a process, within three seconds."""
    import httpx
    from huggingface_hub import constants

    with suppress(httpx.HTTPError):
        return not constants.HF_HUB_OFFLINE and bool(httpx.head(constants.ENDPOINT, timeout=HUB_S))
    return False


def _read_config(file: Path) -> dict:
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8-sig"))  # an editor may add the mark
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no configuration: it must be a JSON object")
    return found


def shape_of(source, name: str | None = None) -> ModelShape:
    """The shape of a preset, folder, config.json, hub id, or configuration (mapping or object).

    Raises ValueError for what cannot be had or is no decoder of transformers.
    """
    if not isinstance(source, str | Path):
        config = source if isinstance(source, Mapping) else source.to_dict()
        name = name or "model"
    else:
        config = config_of(source)
        file = None if preset(str(source)) else _local_file(source)
        name = name or (file.resolve().parent.name if file else str(source))
    _check_sizes(config)
    word, declared = declared_word(config), config.get("quantization_config") or {}
    noise = (
        "quantization_config", "_name_or_path", "transformers_version", "dtype", "torch_dtype",
    )  # fmt: skip
    said = {k: v for k, v in config.items() if k not in noise}
    shape = _cached_shape(json.dumps(said, sort_keys=True, default=str))
    kept_plain = tuple(declared.get("modules_to_not_convert") or ())
    return replace(shape, name=name, quantization=word, unquantized=kept_plain)


@lru_cache(maxsize=256)
def _cached_shape(config: str) -> ModelShape:
    key = f"{SCHEMA} {importlib.metadata.version('transformers')} {config}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = cache_dir() / "shapes" / f"{digest}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return from_json(file.read_text(encoding="utf-8"))
    from llmperf.models import meta

    shape = meta.read(as_object(json.loads(config)))
    with suppress(OSError):  # a read-only cache costs time, not the answer
        save_whole(file, json.dumps(asdict(shape)))
    return shape


def as_object(config: Mapping):
    """The transformers configuration of a mapping. Raises ValueError for a type not known there."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers knows no model of type {kind!r}: update it, or use another; Python code"
            " that a model brings along is never run here"
        )
    try:
        plain = {k: v for k, v in config.items() if k != "auto_map"}
        return CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(plain), object_hook=_infinity))
    except Exception as error:  # its validators raise errors of many kinds
        why = f"transformers refuses the configuration of a {kind}: {first_line(error)}"
        raise ValueError(why) from error


def _infinity(value: dict) -> dict | float:
    """transformers saves an infinite number as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _check_sizes(config: Mapping) -> None:
    """Raise ValueError for counts that no model has, before anything is built."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(value)
        elif isinstance(value, int) and "token_id" not in key:
            most = MOST_LAYERS if "layer" in key else LARGEST
            if abs(value) > most:
                raise ValueError(f"{key} is {value:,}: at most {most:,} can be")


def declared_word(config: Mapping) -> str | None:
    """The word for what a checkpoint declares, as `awq-4-g128`; see `quantization.scheme`. None
    for compressed-tensors, since transformers takes the model's dtype for its weights."""
    declared = config.get("quantization_config") or {}
    kept = declared.get("modules_to_not_convert") or () if isinstance(declared, Mapping) else None
    if not isinstance(kept, list | tuple) or not all(isinstance(name, str) for name in kept):
        wanted = "a mapping whose modules_to_not_convert is a list of names"
        raise ValueError(f"quantization_config is {declared!r:.60}: it must be {wanted}")
    method = str(declared.get("quant_method", "")).lower()
    if not declared or method == "compressed-tensors":
        return None
    if method == "bitsandbytes":
        double = "-double" if declared.get("bnb_4bit_use_double_quant") else ""
        return "bnb-8" if declared.get("load_in_8bit") else f"bnb-4{double}"
    if method in ("awq", "gptq"):
        return f"{method}-{declared.get('bits', 4)}-g{declared.get('group_size', 128)}"
    if method == "fp8":
        return f"fp8-b{(declared.get('weight_block_size') or [0])[0]}"
    return method or "unknown"
