"""Quantisation: bytes as predicted, outputs near the original, nothing held whole, bad words."""

import importlib.util
from dataclasses import asdict

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from llmperf import models, predict
from llmperf.models import ModelUnavailable, configs, quantization, quantize

HAVE_BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not HAVE_BNB, reason="bitsandbytes is not installed (extra bnb)")
WORDS = ["int8", "int4", *(pytest.param(w, marks=needs_bnb) for w in ("bnb-8", "bnb-4"))]
IDS = dict(bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "llama": LlamaConfig(
        **IDS,
        vocab_size=260,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(**IDS, vocab_size=260, n_positions=64, n_embd=64, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    kind = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    kind(CONFIGS[request.param]).save_pretrained(folder)
    models.byte_tokenizer().save_pretrained(folder)
    return folder


def held(module) -> int:
    """Bytes of all parameters and of what bitsandbytes keeps beside them."""
    found = {id(p): p.nbytes for p in module.parameters()}
    for p in module.parameters():
        if state := getattr(p, "quant_state", None):
            found[id(p), "absmax"] = state.absmax.nbytes
            found[id(p), "table"] = state.code.nbytes
        if (scales := getattr(p, "SCB", None)) is not None:
            found[id(p), "scales"] = scales.nbytes
    return sum(found.values())


def logits(model, ids):
    with torch.inference_mode():
        return model.module(input_ids=ids).logits.float()


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("word", WORDS)
def test_bytes_are_those_predicted_and_outputs_are_near(folder, word, rows):
    plain = models.load(str(folder), dtype="bf16", device="cpu")
    small = models.load(str(folder), dtype="bf16", device="cpu", quantization=word)
    assert (small.weights, small.quantization) == ("trained", word)
    assert held(small.module) == predict.weights_bytes(small.shape, "bf16", word)
    assert held(small.module) < held(plain.module)
    ids = torch.arange(10, 10 + rows).reshape(-1, 1) if rows > 1 else torch.tensor([[65, 66, 67]])
    expected = logits(plain, ids)
    error = (logits(small, ids) - expected).norm() / expected.norm()
    assert error < (0.02 if "8" in word else 0.3)
    again = models.load(**asdict(small.source))
    assert torch.equal(logits(again, ids), logits(small, ids))


@pytest.mark.parametrize("word", WORDS)
def test_random_weights_are_quantised_before_the_next_layer_is_made(folder, word, monkeypatch):
    """While it is built, no more than one layer stands unquantised."""
    whole, filled = [], quantize._fill

    def watched(module, child, device):
        filled(module, child, device)
        linears = [x for x in module.modules() if type(x) in (torch.nn.Linear, Conv1D)]
        whole.append(sum(not x.weight.is_meta for x in linears))

    monkeypatch.setattr(quantize, "_fill", watched)
    made = models.load(str(folder), "bf16", "cpu", "random", word)
    assert max(whole) == 1
    assert (made.weights, made.quantization) == ("random", word)
    assert held(made.module) == predict.weights_bytes(made.shape, "bf16", word)
    assert not any(t.is_meta for t in [*made.module.parameters(), *made.module.buffers()])
    assert logits(made, torch.tensor([[65, 66, 67]])).isfinite().all()
    same = models.load(**asdict(made.source))
    assert torch.equal(*(logits(m, torch.tensor([[65, 66, 67]])) for m in (made, same)))


@pytest.mark.parametrize("word", ["none", "int8"])
def test_random_buffers_are_those_of_an_ordinary_model(folder, word):
    made = models.load(str(folder), "bf16", "cpu", "random", word).module
    config = AutoConfig.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs = dict(plain.named_buffers())
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    sizes = [m.get_input_embeddings().weight.float().std().item() for m in (made, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_int8_gives_the_same_from_the_kernel_and_from_the_plain_product(dtype):
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    layer = quantize._quantized(torch.nn.Linear(96, 40).to(dtype), "int8")
    x = torch.randn(20, 96).to(dtype)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(one_by_one, layer(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"quantization": "exl2"}, "unknown quantization 'exl2': leave it None, or choose none"),
        ({"quantization": "int4", "dtype": "fp32"}, "int4 computes in bf16, and dtype is fp32"),
    ],
)
def test_bad_words_say_what_would_be_right(folder, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.load(str(folder), **{"dtype": "bf16", "device": "cpu", **wrong})


def test_what_is_not_installed_is_named_with_its_extra(folder, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(quantize, "_bitsandbytes", missing)
    with pytest.raises(ModelUnavailable, match=r"'bitsandbytes'.*llmperf-study\[bnb\]"):
        models.load(str(folder), "bf16", "cpu", "random", "bnb-4")


def test_a_word_is_held_against_what_the_checkpoint_declares():
    with pytest.raises(ValueError, match="these weights are quantised by awq: leave"):
        quantization.word_of_checkpoint("int8", "awq")
    with pytest.raises(ValueError, match="these weights are not quantised by awq"):
        quantization.word_of_checkpoint("awq", None)


def test_a_checkpoint_declares_its_method():
    plain = LlamaConfig().to_dict()
    assert configs.declared_word(plain) is None
    plain["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    assert configs.declared_word(plain) == "awq-4-g128"
    double = {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": True}
    assert configs.declared_word({"quantization_config": double}) == "bnb-4-double"


def test_every_word_that_loads_is_one_that_predict_knows(tiny):
    for word in quantization.QUANTIZATIONS:
        assert predict.weights_bytes(tiny.shape, "bf16", word) > 0
