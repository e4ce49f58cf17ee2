"""Shapes: every parameter of every family against real modules of transformers, tiny and random."""

import json
import subprocess
import sys

import pytest
from tiny_models import CONFIGS, SMALL, build

from llmperf.models import shapes


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
