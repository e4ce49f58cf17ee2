"""Bytes, FLOPs, bounds and the audit: against real modules, by hand, over the published rows."""

from dataclasses import replace

import pytest
from tiny_models import CONFIGS, SMALL, build

from llmperf import predict
from llmperf.findings import published
from llmperf.models import Tensor, cached_tensors, converted, scheme, shape_of, stored, with_cache
from llmperf.predict import Cost, RunSpec, forward


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request):
    """(shape, module, configuration) of one family."""
    module, config = build(request.param)
    return shape_of(config), module, config


def tiny_shape(case):
    family, fields = CONFIGS[case]
    return shape_of({"model_type": family, **fields})


def _held(tensors) -> int:
    """Bytes of the storages behind some tensors: a slice keeps all of what it was cut from."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_weights_are_exact_to_the_byte(tiny):
    shape, module, _ = tiny
    assert predict.weights_bytes(shape, "fp32") == _held(module.parameters())
    assert sum(predict.buffers(shape, "fp32")) == sum(b.nbytes for b in module.buffers())


@pytest.mark.parametrize("prompt, steps", [(5, 1), (12, 3), (3, 9)])
def test_the_cache_is_exact_to_the_byte(tiny, prompt, steps):
    """After each decode step; sliding layers (window 8) hold min(window, length) tokens."""
    import torch
    from transformers import DynamicCache

    shape, module, config = tiny
    cache, batch = DynamicCache(config=config), 2
    with torch.no_grad():
        module(torch.ones(batch, prompt, dtype=torch.long), **with_cache(module, cache))
        for step in range(1, steps + 1):
            module(torch.ones(batch, 1, dtype=torch.long), **with_cache(module, cache))
            held = _held(t for layer in cache.layers for _, t in cached_tensors(layer))
            assert predict.kv_bytes(shape, batch, prompt + step, "fp32") == held


def test_linear_flops_are_those_of_the_modules_that_ran():
    """2 FLOPs a weight: every linear of a dense model runs once a token, head included."""
    for case in ("llama", "gpt2", "gemma2"):
        module, config = build(case)
        shape = shape_of(config)
        two_dimensional = sum(p.numel() for n, p in module.named_parameters() if p.dim() == 2)
        looked_up = shape.vocab * shape.hidden * (not shape.tied_embeddings)
        looked_up += sum(t.numel for t in shape.tensors if t.role == "position")
        head = 2 * shape.vocab * shape.hidden
        assert shape.token_flops + head == 2 * (two_dimensional - looked_up), case


def test_quantized_weights_by_hand():
    """Layers of 256 and 128 inputs in all schemes; torch's own convert the output layer too."""
    config = dict(
        model_type="llama",
        vocab_size=10,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    shape = shape_of(config)
    plain = 2 * (2 * 10 * 256 + 3 * 256)  # embedding, head and three norms in 16 bits
    weights = 4 * 256 * 256 + 3 * 256 * 128
    # AWQ, groups of 128 inputs: for each group and output a 4-bit zero and a 16-bit scale.
    # q, k, v, o have 2 groups of 256 outputs; gate and up 2 groups of 128; down 1 group of 256.
    entries = 4 * 2 * 256 + 2 * 2 * 128 + 256
    awq = plain + weights // 2 + entries // 2 + entries * 2
    assert predict.weights_bytes(shape, "fp16", "awq") == awq
    # GPTQ adds an int32 group number for each input: 256 for six matrices, 128 for down.
    assert predict.weights_bytes(shape, "fp16", "gptq") == awq + 4 * (6 * 256 + 128)
    # bitsandbytes, 4 bit: a fp32 absmax for 64 weights and a table of 16 fp32 a matrix.
    nf4 = plain + weights // 2 + 4 * weights // 64 + 7 * 64
    assert predict.weights_bytes(shape, "fp16", "bnb-4") == nf4
    # bitsandbytes, 8 bit: a fp32 scale an output; 6 matrices have 256 (o, q, k, v, down), 2 128.
    int8 = plain + weights + 4 * (5 * 256 + 2 * 128)
    assert predict.weights_bytes(shape, "bf16", "bnb-8") == int8
    # torch's own, 8 bit: a scale an output in the model's dtype, the output layer too.
    plain += 10 * 256 + 2 * 10 - 2 * 10 * 256  # int8 and its scales in place of bf16
    assert predict.weights_bytes(shape, "bf16", "int8") == plain + weights + 2 * (5 * 256 + 2 * 128)
    # torch's own, 4 bit: a scale and a zero in bf16 for 64 inputs; the output layer has 8 bits.
    assert predict.weights_bytes(shape, "bf16", "int4") == plain + weights // 2 + 4 * weights // 64
    # A tied embedding is then kept beside the output layer, and no longer read.
    tied = shape_of(config | {"tie_word_embeddings": True})
    int8 = predict.weights_bytes(shape, "bf16", "int8")
    assert predict.weights_bytes(tied, "bf16", "int8") == int8
    assert predict.weights_read(tied, "bf16", "int8") == int8 - 2 * 10 * 256
    with_bias = replace(tied, tensors=(*tied.tensors, Tensor("lm_head.bias", "head", None, 10)))
    for shape in (tied, with_bias):
        assert predict.weights_read(shape, "bf16") == predict.weights_bytes(shape, "bf16")
    with pytest.raises(ValueError, match="unknown quantization 'exl2'"):
        predict.weights_bytes(shape, "fp16", "exl2")
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        predict.weights_bytes(shape, "fp8")


def test_schemes_of_checkpoints_by_hand():
    """Double quantisation, blocks of fp8, and experts in mxfp4; a norm in a list stays as it is."""
    one = next(t for t in tiny_shape("llama").tensors if t.linear)  # 32 x 32
    sizes = {
        "bnb-4-double": [512, 16, 64, 4, 1024, 4],
        "fp8-b8": [1024, 4 * 16],
        "fp8": [1024, 4],
    }
    shape = tiny_shape("llama")
    for word, expected in sizes.items():
        assert list(stored(one, scheme(word), 2)) == expected, word
    gpt_oss, mxfp4 = shape_of("gpt-oss-20b"), scheme(shape_of("gpt-oss-20b").quantization)
    kinds = {t.role for t in gpt_oss.tensors if converted(gpt_oss, t, mxfp4)}
    assert kinds == {"expert"}
    kept = replace(shape, unquantized=("layers.0.self_attn",))
    assert not converted(kept, one, scheme("awq"))


def test_experts_that_a_batch_hits_are_read():
    """8 experts, 2 a token: a quarter at one token, almost all of them at 30."""
    shape = tiny_shape("deepseek-v3")
    experts = sum(4 * t.numel for t in shape.tensors if t.role == "expert")
    one, many = (predict.weights_read(shape, "fp32", None, n) for n in (1, 30))
    assert many - one == pytest.approx(experts * ((1 - 0.75**30) - 0.25))


def test_a_checkpoint_brings_its_own_quantization():
    shape = shape_of("yi-34b-chat-4bits")
    assert predict.weights_bytes(shape, "fp16") == predict.weights_bytes(shape, "fp16", "awq")
    assert predict.weights_bytes(shape, "fp16", "none") == 2 * shape.parameters()


def test_a_run_is_a_prefill_and_steps_or_windows_that_slide():
    spec = RunSpec(tiny_shape("mistral"), "fp32", rows=3, prompt_tokens=6, new_tokens=3)
    flops = sum(forward(spec, *tokens).flops for tokens in ((6,), (1, 6), (1, 7)))
    assert (predict.run_cost(spec).flops, predict.run_cost(spec).steps) == (flops, 3)
    spec = RunSpec(spec.shape, "fp32", prompt_tokens=198, new_tokens=20, loop="recompute")
    lengths = [198, 199] + [predict.WINDOW] * 18
    expected = sum(forward(spec, n, logits=n).flops for n in lengths)
    assert predict.run_cost(spec).flops == pytest.approx(expected, rel=1e-12)


def test_attention_counts_pairs():
    shape = tiny_shape("mistral")  # window 8
    pairs = sum(min(8, 5 + i) for i in range(1, 11))  # tokens 6 to 15, each with itself
    width = 2 * SMALL["num_attention_heads"] * 2 * shape.head_dim * shape.layers
    assert predict.attention_flops(shape, 10, 5) == width * pairs
    assert predict.attention_flops(shape, 3, 20) == width * 3 * 8


def test_the_decode_bound_by_hand():
    """SmolLM2 in fp32 at 30 GB/s: 134,515,008 x 4 bytes take 17.9 ms, 56 tokens/s."""
    shape = shape_of("smollm2-135m")
    spec = RunSpec(shape, "fp32")
    bound = predict.decode_bound(spec, 0, 30e9, 0.33e12)
    # the cache's new entry: 30 layers, keys and values of 3 heads of 64, 4 bytes
    assert bound.bytes == 134_515_008 * 4 + 30 * 2 * 3 * 64 * 4
    assert bound.limit == "bandwidth"
    assert 1 / bound.seconds == pytest.approx(55.7, abs=0.1)
    assert predict.decode_bound(replace(spec, rows=512), 0, 30e9, 0.33e12).limit == "arithmetic"
    with pytest.raises(ValueError, match="bandwidth_bytes_s is 0"):
        predict.decode_bound(spec, 0, 0)


def test_audit_says_its_arithmetic():
    cost = Cost(bytes=100e9, flops=50e12, steps=10)
    good = predict.audit(cost, 2.0, 100e9, 50e12)
    assert (good.plausible, good.mbu, good.mfu) == (True, 0.5, 0.5)
    bad = predict.audit(cost, 0.8, 200e9, 50e12)
    assert not bad.plausible
    assert bad.mfu == pytest.approx(1.25)
    assert bad.sentence == (
        "10 steps take at least 50,000.0 GFLOP, 1 s at 50,000 GFLOP/s; measured 0.8 s: MFU 1.25, "
        "implausible"
    )
    with pytest.raises(ValueError, match="measured time"):
        predict.audit(cost, 0.0, 1e9)


def test_published_rows_that_break_their_cards_bandwidth():
    """Each step reads the weights, once for a whole batch; 256 steps a line.

    GPT-2, fp32, on the A2000 (176 GB/s): 124,439,808 parameters less 786,432 of the position
    table, 4 bytes: 0.4946 GB a step, 2.81 ms, 0.72 s for 256; the fastest line took 1.907 s, ten
    coroutines 23.0 s of at least 7.2: all pass.
    Yi-6B, 16 bits, on the RTX 4090 (1,008 GB/s): 6,061,035,520 less the 262,144,000 of the
    embedding, 2 bytes: 11.60 GB a step, 11.5 ms, 2.945 s: all lines pass that took longer, and
    only batches 7 (6.867 s), 8 (3.887 s) and 9 (6.892 s) did: lines 48 to 50 of the file.
    Yi-34B, AWQ, on the same card: 33.47 G weights at 4 bits + 20 bits for each 128 = 17.389 GB,
    and 0.919 GB of head and norms: 18.31 GB, 18.2 ms, 4.650 s. Broken by the first and third
    single run (3.346, 3.521 s), batch 10 (4.429 s) and one thread (3.332 s; 3.334 s for the
    group); five and ten threads took 50 and 126 s of at least 23 and 46.
    """
    rows = published.audited().to_dict("records")
    assert len(rows) == 164
    flagged = [row["line"] for row in rows if not row["audit"].plausible]
    assert flagged == [*range(32, 48), 51, 108, 110, 112, 113, 114]
    least = {r["model"]: r["audit"].mbu * float(r["seconds"]) for r in rows if r["line"] < 112}
    assert least["GPT2"] / 10 == pytest.approx(0.7194, abs=5e-4)  # line 107: ten threads
    assert least["Yi-6B-Chat"] == pytest.approx(2.9455, abs=5e-4)
    assert least["Yi-34B-Chat-4bits"] == pytest.approx(4.6497, abs=5e-4)


def test_cards_answer_to_the_drivers_names():
    names = {
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA RTX A2000 Laptop GPU": "RTX A2000 Laptop 4GB",
        "NVIDIA H100 80GB HBM3": "H100 SXM5",
        "NVIDIA H200": "H200 SXM",
        "rtx 3060 ti": "RTX 3060 Ti",
    }
    assert {name: predict.card(name).name for name in names} == names
    assert predict.card("RTX 4070", memory_gib=12).memory_gib == 12
    for other in ("RTX 3090 Ti", "RTX 4090 Laptop GPU", "RTX 3060"):
        with pytest.raises(ValueError, match="unknown card.*memory_gib.*RTX 3060 Ti, RTX 3090"):
            predict.card(other)


def test_a_step_of_recompute_reads_its_window():
    recompute = RunSpec(tiny_shape("llama"), "fp32", loop="recompute")
    window = predict.decode_bound(recompute, 5000, 100e9, 1e12)
    assert window.flops == forward(recompute, 200, logits=200).flops


def test_the_products_of_a_token():
    # 4 layers: q and o 32 x 32; k and v 16 x 32; gate and up 48 x 32; down 32 x 48; one head
    products = {(32, 32): 8, (16, 32): 8, (48, 32): 8, (32, 48): 4, (101, 32): 1}
    assert predict.matmul_shapes(tiny_shape("llama")) == products
