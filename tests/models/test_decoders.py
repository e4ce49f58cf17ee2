"""Every decoder of transformers: loads, gives `generate`'s tokens, is counted to the byte."""

import pytest
import torch
from tiny_models import DECODERS, config_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, GenerationConfig

from llmperf import decoding, models, predict
from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import GREEDY

PROMPTS = [tuple(range(5, 12)), tuple(range(20, 31))]
NEW = 6
KNOWN = [kind for kind in DECODERS if kind in CONFIG_MAPPING]  # to the transformers installed


def test_there_are_at_least_sixty_types():
    assert len(KNOWN) >= 60
    assert set(DECODERS) - set(KNOWN) <= {"exaone", "iquestcoder"}  # not in transformers 5.17


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, and those of other tests may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KNOWN)
def decoder(request, tmp_path_factory):
    """A tiny model with random weights, loaded from its folder."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config_of(request.param, DECODERS[request.param]))
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)  # far from uniform, so that a wrong input shows in the tokens
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    models.byte_tokenizer().save_pretrained(folder)
    return models.load(str(folder), dtype="fp32", device="cpu")


def generated(module, rows):
    """What `generate` gives for prompts padded on the left."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    module.generation_config.eos_token_id = None  # a request here has a fixed length
    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    out = module.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    return out[:, columns:].tolist()


def test_tokens_are_those_of_generate(decoder):
    for rows in (PROMPTS[:1], PROMPTS):
        expected = generated(decoder.module, rows)
        for loop in ("cached", "recompute"):
            requests = [Request(i, row, NEW) for i, row in enumerate(rows)]
            steps = decoding.decode(decoder, requests, loop=loop, sampling=GREEDY)
            assert [list(row) for row in zip(*steps, strict=True)] == expected, (loop, len(rows))


def test_bytes_in_bf16_are_exact_for_trained_and_random_weights(decoder):
    """Some routers and states stay in fp32; int8 converts linear layers, but no stacked experts."""
    for weights in ("trained", "random"):
        for word in ("none", "int8"):
            how = {"weights": weights, "quantization": word}
            model = models.load(decoder.name, dtype="bf16", device="cpu", **how)
            held = sum(p.nbytes for p in model.module.parameters())
            assert predict.weights_bytes(model.shape, "bf16", word) == held, (weights, word)
            buffers = sum(b.nbytes for b in model.module.buffers())
            assert sum(predict.buffers(model.shape, "bf16")) == buffers, (weights, word)
            with torch.inference_mode():
                assert model.module(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_bytes_are_exact_and_flops_are_those_of_torchs_counter(decoder):
    shape, module = decoder.shape, decoder.module
    parameters = list(module.parameters())
    assert shape.parameters() == sum(p.numel() for p in parameters)
    assert predict.weights_bytes(shape, "fp32") == sum(p.nbytes for p in parameters)
    assert sum(predict.buffers(shape, "fp32")) == sum(b.nbytes for b in module.buffers())
    module.set_attn_implementation("eager")  # fused attention and grouped experts are not counted
    module.set_experts_implementation("batched_mm")
    cache, counter = DynamicCache(config=module.config), FlopCounterMode(display=False)
    how = models.with_cache(module, cache)
    with torch.no_grad():
        module(input_ids=torch.ones(2, 10, dtype=torch.long), **how)
        with counter:
            at = torch.full((2, 1), 10)
            module(input_ids=torch.ones(2, 1, dtype=torch.long), position_ids=at, **how)
    held = {  # a slice keeps all of what it was cut from
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for _, t in models.cached_tensors(layer)
    }
    assert predict.kv_bytes(shape, 2, 11, "fp32") == sum(held.values())
    step = predict.forward(predict.RunSpec(shape, "fp32", rows=2), 1, 10)
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
