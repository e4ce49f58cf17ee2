"""The shape of a model, from its configuration alone: every tensor, counted, without torch.

`preset` knows the study's models, `from_config` and `from_folder` read a transformers
configuration, `resolve` takes any of these names or a hub id.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from llmperf import REFERENCE
from llmperf.models.tensors import MLA, ModelShape, MoE

ALIASES = {"smollm2-135m": "smollm2-135m-instruct"}

# What a family does that its config.json need not say (transformers 5, modeling_*.py).
# `tied` is the default of tie_word_embeddings, `head_dim` that of head_dim.
_LLAMA = dict(tied=False)
_GEMMA = dict(tied=True, head_dim=256, scaled_embedding=True)
FAMILIES: dict[str, dict] = {
    "gpt2": dict(
        tied=True,
        learned_positions=True,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_bias=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": dict(tied=False, qkv_bias=True),
    "qwen3": dict(tied=False, qk_norm=True, head_dim=128),
    "gemma": _GEMMA,
    "gemma2": dict(_GEMMA, norms_per_layer=4),
    "gemma3_text": dict(_GEMMA, norms_per_layer=4, qk_norm=True),
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
}
_GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_MLA_KEYS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE_KEYS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")


@lru_cache(maxsize=1)
def _preset_rows() -> dict[str, dict]:
    with (REFERENCE / "models.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def presets() -> tuple[str, ...]:
    """The names that `preset` knows."""
    return (*_preset_rows(), *ALIASES)


def preset(name: str) -> ModelShape:
    """The shape of one of the study's models, by its name in `models.csv` or its hub id.

    Raises ValueError for a name that is not there.
    """
    key = ALIASES.get(name.lower(), name.lower())
    rows = _preset_rows()
    row = rows.get(key) or next((r for r in rows.values() if r["hub_id"] == name), None)
    if row is None:
        raise ValueError(f"unknown model {name!r}: the presets are {', '.join(presets())}")
    config = {
        "architectures": [row["architecture"]],
        "hidden_size": int(row["hidden"]),
        "num_hidden_layers": int(row["layers"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "intermediate_size": int(row["intermediate"]),
        "vocab_size": int(row["vocab"]),
        "max_position_embeddings": int(row["max_positions"]),
        "tie_word_embeddings": row["tied_embeddings"] == "yes",
    }
    if "4bits" in row["name"]:  # the table's source column: AWQ, groups of 128
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    return replace(from_config(config, row["name"]), hub_id=row["hub_id"])


def from_folder(path: str | Path) -> ModelShape:
    """The shape of the model in a local folder, from its `config.json`."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} has no config.json: give a folder that a model was saved in")
    return from_config(json.loads(file.read_text(encoding="utf-8")), Path(path).name)


def resolve(source: str | Path) -> ModelShape:
    """The shape behind a preset's name, a local folder, or a hub id (its config.json is fetched).

    Raises ValueError, naming the presets, when it is none of these or cannot be had.
    """
    if Path(source).is_dir():
        return from_folder(source)
    try:
        return preset(str(source))
    except ValueError:
        if str(source).count("/") != 1:
            raise
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(str(source), "config.json")
    except Exception as error:  # offline, unknown, gated: one answer serves all
        known = ", ".join(presets())
        raise ValueError(
            f"cannot fetch the config.json of {source} ({type(error).__name__}): "
            f"use a local folder or a preset ({known})"
        ) from error
    return replace(from_folder(Path(file).parent), name=str(source), hub_id=str(source))


def from_config(config: Mapping, name: str = "model") -> ModelShape:
    """The shape that a transformers configuration, as a dict, describes.

    Raises ValueError naming the fields that are missing, or the families known.
    """
    config = config.get("text_config") or config  # multimodal: the language model inside
    family = _family(config)
    flags = dict(FAMILIES[family])
    c = {_GPT2_KEYS.get(k, k): v for k, v in config.items() if v is not None}
    if family == "gpt2" and "hidden_size" in c:
        c.setdefault("intermediate_size", c.get("n_inner") or 4 * c["hidden_size"])
    _check(c, family)
    tied, head_dim = flags.pop("tied"), flags.pop("head_dim", None)
    heads = c["num_attention_heads"]
    for flag in ("qkv_bias", "out_bias"):
        if family != "qwen2" and c.get("attention_bias"):
            flags[flag] = True
    if c.get("mlp_bias"):
        flags["mlp_bias"] = True
    return ModelShape(
        name=name,
        family=family,
        architecture=(config.get("architectures") or [_architecture(family)])[0],
        hidden=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim") or head_dim or c["hidden_size"] // heads,
        intermediate=c["intermediate_size"],
        vocab=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        tied_embeddings=bool(c.get("tie_word_embeddings", tied)),
        windows=_windows(c, family),
        mla=_mla(c, family),
        moe=_moe(c, family),
        quantization=_quantization(c.get("quantization_config")),
        **flags,
    )


def _architecture(family: str) -> str:
    special = {"gpt2": "GPT2LMHeadModel", "gemma3_text": "Gemma3ForCausalLM"}
    return special.get(family, family.title().replace("_", "") + "ForCausalLM")


def _family(config: Mapping) -> str:
    known = {_architecture(f): f for f in FAMILIES}
    for family in (config.get("model_type"), known.get((config.get("architectures") or [""])[0])):
        if family in FAMILIES:
            return family
    said = config.get("model_type") or config.get("architectures") or "no model_type"
    raise ValueError(
        f"cannot count the tensors of {said!r}: the families known are {', '.join(FAMILIES)}"
    )


def _check(c: Mapping, family: str) -> None:
    needed = list(_REQUIRED)
    if family in ("gemma2", "gemma3_text"):  # their default is not the number of heads
        needed.append("num_key_value_heads")
    if family.startswith("deepseek"):
        needed += [*_MLA_KEYS, *_MOE_KEYS]
    missing = [key for key in needed if c.get(key) is None]
    if missing:
        raise ValueError(f"the configuration ({family}) lacks {', '.join(missing)}")
    if c["hidden_size"] % c["num_attention_heads"] and not c.get("head_dim"):
        raise ValueError(
            f"hidden_size {c['hidden_size']} is not a multiple of num_attention_heads "
            f"{c['num_attention_heads']} and the configuration gives no head_dim"
        )


def _windows(c: Mapping, family: str) -> tuple[int | None, ...]:
    """Which layers slide, as each family's configuration class fills in `layer_types`."""
    window, layers = c.get("sliding_window"), range(c["num_hidden_layers"])
    if not window or (family.startswith("qwen") and not c.get("use_sliding_window")):
        return ()
    if family == "mistral":
        sliding = [True for _ in layers]
    elif "layer_types" in c:
        sliding = [kind == "sliding_attention" for kind in c["layer_types"]]
    elif family.startswith("qwen"):
        sliding = [i >= c.get("max_window_layers", 28) for i in layers]
    elif family in ("gemma2", "gemma3_text"):
        pattern = 2 if family == "gemma2" else c.get("sliding_window_pattern", 6)
        sliding = [bool((i + 1) % pattern) for i in layers]
    else:  # llama, gpt2 and the rest attend to everything
        return ()
    return tuple(window if slides else None for slides in sliding)


def _mla(c: Mapping, family: str) -> MLA | None:
    if not family.startswith("deepseek"):
        return None
    rank, nope, rope, value = (c[key] for key in _MLA_KEYS)
    return MLA(c.get("q_lora_rank"), rank, nope, rope, value)


def _moe(c: Mapping, family: str) -> MoE | None:
    if not family.startswith("deepseek"):
        return None
    experts, shared, per_token, width = (c[key] for key in _MOE_KEYS)
    first = c.get("first_k_dense_replace", 3 if family == "deepseek_v3" else 0)
    return MoE(experts, shared, per_token, width, first)


def _quantization(config: Mapping | None) -> str | None:
    """The word that `predict` takes, as `awq-4-g128`, from a checkpoint's quantization_config."""
    if not config:
        return None
    method = str(config.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        return "bnb-8" if config.get("load_in_8bit") else "bnb-4"
    group = config.get("group_size", 128)
    return f"{method}-{config.get('bits', 4)}-g{group}"
