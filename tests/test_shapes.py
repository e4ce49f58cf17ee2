"""Shapes: every parameter of every family against real modules of transformers, tiny and random."""

import json
import subprocess
import sys

import pytest

from llmperf import shapes

SMALL = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LATENT = dict(
    SMALL,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=12,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=8,
)
CONFIGS = {
    "gpt2": ("gpt2", dict(vocab_size=101, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "gpt2-inner": (
        "gpt2",
        dict(vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=40),
    ),
    "llama": ("llama", SMALL),
    "llama-bias-tied": (
        "llama",
        dict(SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    ),
    "mistral": ("mistral", dict(SMALL, sliding_window=8)),
    "qwen2": ("qwen2", SMALL),
    "qwen2-sliding": (
        "qwen2",
        dict(SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
    "qwen3": ("qwen3", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(SMALL, head_dim=16)),
    "gemma2": ("gemma2", dict(SMALL, head_dim=16, sliding_window=8)),
    "gemma3": ("gemma3_text", dict(SMALL, num_hidden_layers=7, head_dim=16, sliding_window=8)),
    "deepseek-v2": ("deepseek_v2", dict(LATENT, q_lora_rank=None, topk_method="greedy")),
    "deepseek-v3": (
        "deepseek_v3",
        dict(LATENT, q_lora_rank=10, n_group=2, topk_group=1, attention_bias=True),
    ),
}


def build(case: str):
    """A tiny random module of the case, in fp32 on the CPU, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = CONFIGS[case]
    ids = dict(bos_token_id=1, eos_token_id=2)  # the defaults lie outside so small a vocabulary
    config = AutoConfig.for_model(family, **fields, **ids)
    return AutoModelForCausalLM.from_config(config).eval(), config


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_of_a_real_module_is_counted(case):
    module, config = build(case)
    shape = shapes.from_config(config.to_dict())
    counted = sorted(t.numel for t in shape.tensors())
    assert counted == sorted(p.numel() for p in module.parameters())
    assert shape.parameters() == sum(p.numel() for p in module.parameters())


def test_presets_count_what_the_table_says():
    for name in shapes.presets():
        row = shapes._preset_rows()[shapes.ALIASES.get(name, name)]
        assert shapes.preset(name).parameters() == int(row["parameters"]), name


def test_a_preset_answers_to_its_name_its_alias_and_its_hub_id():
    assert shapes.preset("smollm2-135m") == shapes.preset("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert shapes.preset("GPT2").architecture == "GPT2LMHeadModel"
    assert shapes.preset("yi-34b-chat-4bits").quantization == "awq-4-g128"


def test_windows_are_those_of_the_family():
    def windows(case):
        _, config = CONFIGS[case]
        return shapes.from_config({"model_type": CONFIGS[case][0], **config}).windows

    assert windows("llama") == ()
    assert windows("mistral") == (8, 8, 8, 8)
    assert windows("qwen2-sliding") == (None, None, 8, 8)
    assert windows("gemma2") == (8, None, 8, None)
    assert windows("gemma3") == (8, 8, 8, 8, 8, None, 8)


def test_a_folder_is_read_from_its_config(tmp_path):
    config = {"model_type": "llama", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert shapes.resolve(tmp_path).parameters() == shapes.from_config(config).parameters()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        shapes.resolve(tmp_path / "empty")


def test_bad_configurations_say_what_is_missing():
    lacking = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "num_hidden_layers")}
    with pytest.raises(ValueError, match="lacks vocab_size, num_hidden_layers"):
        shapes.from_config({"model_type": "llama", **lacking})
    with pytest.raises(ValueError, match="lacks kv_lora_rank"):
        shapes.from_config({"model_type": "deepseek_v3", **SMALL})
    with pytest.raises(ValueError, match="'mamba'.*families known are gpt2, llama"):
        shapes.from_config({"model_type": "mamba", **SMALL})
    with pytest.raises(ValueError, match="unknown model 'gpt5'.*gpt2, yi-6b-chat"):
        shapes.resolve("gpt5")
    with pytest.raises(ValueError, match="not a multiple"):
        shapes.from_config({"model_type": "llama", **SMALL, "num_attention_heads": 5})


def test_no_torch_is_needed():
    code = (
        "import sys; from llmperf import shapes, predict; "
        "s = shapes.preset('yi-34b-chat-4bits'); s.parameters(); predict.weights_bytes(s, 'fp16'); "
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
