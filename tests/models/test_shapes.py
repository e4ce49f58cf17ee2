"""Shapes: presets, published totals, what is kept, and what is refused before anything is built."""

import json
import subprocess
import sys

import pytest
from tiny_models import CONFIGS, SMALL

from llmperf import models, predict
from llmperf.models import configs

PUBLISHED = {  # parameters, from the model cards and papers; a tied head once
    "gpt2": 124_439_808,
    "yi-6b-chat": 6_061_035_520,
    "yi-34b-chat": 34_388_917_248,
    "yi-34b-chat-4bits": 34_388_917_248,
    "smollm2-135m": 134_515_008,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "deepseek-v3": 671_026_404_352,
}


def shape(case, **fields):
    family, config = CONFIGS[case]
    return models.shape_of({"model_type": family, **config, **fields})


@pytest.mark.parametrize("name", models.PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    preset = configs.preset(name)
    assert {"hub_id", "source", "date", "config"} <= set(preset)
    assert models.shape_of(name).parameters() == preset["parameters"]
    assert PUBLISHED.get(name, preset["parameters"]) == preset["parameters"]


def test_a_preset_is_added_as_one_file(tmp_path, monkeypatch):
    family, fields = CONFIGS["qwen3"]
    file = tmp_path / "my-model.json"
    known = {"hub_id": "me/my-model", "source": "its authors", "date": "2026-11-24"}
    config = {"model_type": family, "architectures": ["Qwen3ForCausalLM"], **fields}
    file.write_text(json.dumps(known | {"config": config, "parameters": 0}))
    monkeypatch.setitem(configs.FILES, "my-model", file)
    configs.preset.cache_clear()
    assert models.shape_of("my-model").parameters() == shape("qwen3").parameters()


def test_a_preset_answers_to_its_name_and_its_hub_id():
    by_id = models.shape_of("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert models.shape_of("smollm2-135m").tensors == by_id.tensors
    assert models.shape_of("GPT2").parameters() == PUBLISHED["gpt2"]
    assert models.shape_of("yi-34b-chat-4bits").quantization == "awq-4-g128"


def test_a_folder_does_not_shadow_a_preset(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    config = {"model_type": "llama", **SMALL}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert models.shape_of("gpt2").vocab == 50257
    assert models.shape_of("./gpt2").vocab == SMALL["vocab_size"]


def test_windows_are_those_of_the_family():
    assert shape("llama").windows == (None,) * 4
    assert shape("mistral").windows == (8, 8, 8, 8)
    assert shape("qwen2-sliding").windows == (None, None, 8, 8)
    assert shape("gemma2").windows == (8, None, 8, None)
    assert shape("gemma3").windows == (8, 8, 8, 8, 8, None, 8)


def test_experts_and_those_of_a_token_are_counted():
    for case in ("deepseek-v2", "deepseek-v3"):
        assert (shape(case).experts, shape(case).experts_per_token) == (8, 2)
    for name, of_token in (("qwen3-30b-a3b", (128, 8)), ("gpt-oss-20b", (32, 4))):
        found = models.shape_of(name)
        assert (found.experts, found.experts_per_token) == of_token
    assert shape("llama").experts == 0


def test_roles_and_layers_of_every_tensor():
    found = {}
    for t in shape("deepseek-v3").tensors:
        found.setdefault(t.role, set()).add(t.layer)
    assert found["attention"] == found["norm"] - {None} == {0, 1, 2, 3}
    assert found["expert"] == found["router"] == {1, 2, 3}
    assert found["embedding"] == found["head"] == {None}
    assert {t.role for t in shape("gpt2").tensors} >= {"position", "feed-forward"}


def test_a_folder_and_its_config_json_are_read(tmp_path):
    config = {"model_type": "llama", **SMALL}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    for source in (tmp_path, file, str(file)):
        assert models.shape_of(source).parameters() == models.shape_of(config).parameters()
        assert models.shape_of(source).name == tmp_path.name
    file.write_text(json.dumps(config | {"vocab_size": 50}), encoding="utf-8")
    assert models.shape_of(tmp_path).vocab == 50  # an edited file is read again


def test_kept_shapes_are_exact_and_a_torn_file_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    config = {"model_type": "gemma2", **CONFIGS["gemma2"][1], "vocab_size": 103}
    first = models.shape_of(config)
    (file,) = tmp_path.rglob("*.json")
    configs._cached_shape.cache_clear()
    assert models.shape_of(config) == first
    file.write_text(file.read_text()[:99], encoding="utf-8")
    configs._cached_shape.cache_clear()
    assert models.shape_of(config) == first


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "bert"}, "of type 'bert'.*an encoder"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder: use a decoder-only model"),
        ({"model_type": "vit"}, "cannot build and run a decoder of type 'vit'"),
        ({"model_type": "new"}, "knows no model of type 'new'"),
        ({"model_type": "new", "auto_map": {"AutoModel": "x.Y"}}, "brings along is never run"),
        ({"model_type": "llama", "num_hidden_layers": 10**7}, "num_hidden_layers is 10,000,000"),
        ({"model_type": "llama", "num_hidden_layers": 501}, "num_hidden_layers is 501: at most"),
        ({"model_type": "llama", "quantization_config": "x"}, "quantization_config is 'x': it"),
        ({"model_type": "llama", "quantization_config": [1]}, "must be a mapping"),
        (
            {"model_type": "llama", "quantization_config": {"modules_to_not_convert": 5}},
            "modules_to_not_convert is a list of names",
        ),
        ({"model_type": "llama", "vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
        ({"model_type": "llama", **SMALL, "hidden_size": 30}, "refuses the configuration|cannot"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.shape_of(config)


def test_names_that_cannot_be_had_say_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "hub_answers", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    for source, sentence in (
        ("gpt5", "unknown model 'gpt5': choose smollm2-135m, .*gpt2"),
        ("owner/none-of-these", "cannot fetch the config.json of owner/none-of-these"),
        ("not valid/$$", "cannot fetch the config.json"),
        (tmp_path / "empty", "unknown model .*empty"),
        (tmp_path / "list.json", "must be a JSON object"),
    ):
        with pytest.raises(ValueError, match=sentence):
            models.shape_of(source)


def test_a_kept_shape_needs_no_torch():
    models.shape_of("yi-34b-chat-4bits")
    code = (
        "import sys, time; from llmperf import models, predict; start = time.perf_counter();"
        "s = models.shape_of('yi-34b-chat-4bits'); predict.memory(predict.RunSpec(s));"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_vision_part_of_a_multimodal_model_is_held_but_not_read():
    family, text = CONFIGS["gemma3"]
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision |= dict(image_size=28, patch_size=14)
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    whole, alone = models.shape_of(config), models.shape_of({"model_type": family, **text})
    tower = sum(t.numel for t in whole.tensors if t.role == "tower")
    assert whole.parameters() == alone.parameters() + tower and tower > 0
    assert whole.windows == alone.windows
    reads = [predict.weights_read(shape, "fp32") for shape in (whole, alone)]
    assert reads[0] == reads[1]


def test_a_slice_has_the_first_layers_and_keeps_the_rest():
    for name, layers in (("gpt2", 3), ("gemma-3-27b", 6), ("deepseek-v3", 4)):
        whole, part = models.shape_of(name), models.shape_of(f"{name}:layers={layers}")
        assert part.layers == layers and part.name == f"{name}:layers={layers}"
        below = [t for t in whole.tensors if t.layer is None or t.layer < layers]
        assert [t for t in part.tensors if t.role != "tower"] == [
            t for t in below if t.role != "tower"
        ]
        assert part.windows == whole.windows[:layers]
    with pytest.raises(ValueError, match="layers=13 cannot be taken: this model has 12"):
        models.shape_of("gpt2:layers=13")
    with pytest.raises(ValueError, match="layers=62 cannot be taken: this model has 61"):
        models.shape_of("deepseek-v3:layers=62")
