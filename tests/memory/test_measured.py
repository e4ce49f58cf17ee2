"""The measured ledger: tensors to the byte, levels that add up, residuals with a name."""

import pytest
from tiny_models import CONFIGS, build

from llmperf import memory, predict
from llmperf.decoding.batch import with_cache
from llmperf.memory import CHANNELS, ledger, summary
from llmperf.models import shape_of

GIB = 2**30


def generated(module, prompt=20, new=4, rows=2):
    """The cache after `new` tokens: it holds prompt + new - 1 of them."""
    import torch

    ids = torch.randint(3, 100, (rows, prompt))
    with torch.inference_mode():
        return module.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True,
            return_dict_in_generate=True, pad_token_id=0,
        ).past_key_values  # fmt: skip


def made_up(**peaks):
    reason = "the driver model does not report memory per process (WDDM, WSL2)"
    return {n: summary(n, [peaks[n]] if n in peaks else [], reason) for n in CHANNELS}


CLOSED = made_up(rss=10**9)


def sizes(rows):
    return {row.name: row.bytes for row in rows}


@pytest.mark.parametrize("case", CONFIGS)
def test_weights_and_cache_to_the_byte_as_predicted(case):
    module, config = build(case)
    shape = shape_of(config)
    found = sizes(ledger(module, generated(module), CLOSED))
    assert found["weights"] == predict.weights_bytes(shape, "fp32")
    assert found["buffers"] == sum(predict.buffers(shape, "fp32"))
    if not any(shape.windows):
        assert found["kv cache"] == predict.kv_bytes(shape, 2, 23, "fp32")
    else:  # a sliding layer keeps a view of the tensor that the last step appended to
        full = 2 * 23 * 4 * sum(layer.token_elements for layer in shape.cache)
        assert predict.kv_bytes(shape, 2, 23, "fp32") <= found["kv cache"] <= full


def test_a_static_cache_is_held_whole():
    import torch
    from transformers import StaticCache

    module, config = build("llama")
    cache = StaticCache(config=config, max_cache_len=40)
    with torch.inference_mode():
        module(torch.ones(2, 5, dtype=torch.long), **with_cache(module, cache))
    shape = shape_of(config)
    expected = predict.kv_bytes(shape, 2, 40, "fp32")
    # the static layers also count their tokens, in a tensor of one or a few integers
    assert expected <= sizes(ledger(module, cache, CLOSED))["kv cache"] < expected + 1000


def test_on_the_cpu_the_rows_add_up_to_the_resident_set():
    module, _ = build("llama")
    with memory.Sampler() as sampler, sampler.window() as window:
        cache = generated(module)
    rss = window["rss"]["max"]
    for base in (0, 50_000_000):
        rows = ledger(module, cache, window, base)
        assert sum(r.bytes for r in rows if r.level != "of process") == rss
        shared = rows[-1]
        assert shared.name == "of it shared" and 0 <= shared.bytes < rss
    assert sizes(rows)["context and libraries"] == 50_000_000


def test_on_a_gpu_each_level_is_a_row_beyond_the_one_inside():
    module, _ = build("llama")
    held = sum(r.bytes for r in ledger(module, None, CLOSED)[:3])
    peaks = {"allocated": held + 7, "reserved": held + 27, "process_vram": held + 127,
             "device_used": held + 1127}  # fmt: skip
    found = sizes(ledger(module, None, made_up(**peaks)))
    assert found["activations, logits, workspaces"] == 7
    assert found["allocator slack"] == 20
    assert found["context and libraries"] == 100
    assert found["in use before the start"] == 1000
    del peaks["process_vram"]
    rows = ledger(module, None, made_up(**peaks))
    hidden = next(r for r in rows if r.name == "context and libraries")
    assert hidden.bytes is None and "WDDM" in hidden.reason
    assert sizes(rows)["in use before the start"] == 1100, (
        "what cannot be told apart stays in the sum"
    )
