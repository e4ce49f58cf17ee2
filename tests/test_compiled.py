"""The compiled loop: the same tokens as the eager one, and a reason where it cannot work."""

import contextlib
import io
import threading
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llmperf import decoding, models
from llmperf.decoding import fused, sampling
from llmperf.decoding import requests as workload
from llmperf.decoding import static_cache as compiled
from llmperf.models import shapes

GREEDY = sampling.GREEDY
DRAWN = sampling.Sampling(temperature=0.8, top_k=20, top_p=0.9, suppress=(0,))


def tiny(case: str) -> models.Model:
    torch.manual_seed(0)
    module, config = tiny_models.build(case)
    for parameter in module.parameters():  # far from uniform, so that a wrong logit shows
        parameter.data.mul_(4)
    shape = shapes.from_config(config.to_dict(), name=case)
    source = models.LoadSpec(case, "fp32", "cpu", "random")
    return models.Model(case, module, None, shape, "fp32", "cpu", "random", None, 0.0, source)


@pytest.fixture(scope="module")
def loaded():
    made = {}
    return lambda case: made.setdefault(case, tiny(case))


def requests(lengths, new=12):
    texts = [tuple((7 * i + 3 * n) % 100 + 1 for i in range(n)) for n in lengths]
    return [workload.Request(i, t, new + i, seed=i) for i, t in enumerate(texts)]


def steps(model, asked, drawn, stop=None):
    return decoding.decode(model, asked, loop="compiled", sampling=drawn, stop=stop)


def both(model, asked, drawn, stop=None):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ours = list(steps(model, asked, drawn, stop))
    eager = list(decoding.decode(model, asked, loop="cached", sampling=drawn, stop=stop))
    return ours, eager, said.getvalue()


@pytest.mark.parametrize("case", ["llama", "llama-bias-tied", "gpt2", "qwen3"])
@pytest.mark.parametrize("lengths", [(9,), (4, 17, 9)])
@pytest.mark.parametrize("drawn", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_same_tokens_as_the_eager_loop(loaded, case, lengths, drawn):
    model = loaded(case)
    ours, eager, _ = both(model, requests(lengths), drawn)
    assert ours == eager
    assert compiled.prepare(model, len(lengths), 64, drawn).reason is None


def test_a_row_ends_at_its_own_stop_token(loaded):
    model, asked = loaded("llama"), requests((4, 17, 9))
    free, _, _ = both(model, asked, GREEDY)
    stop = workload.Stop(end_ids=frozenset({free[3][1]}))
    ours, eager, _ = both(model, asked, GREEDY, stop)
    assert ours == eager
    assert ours[-1][1] is None


def test_a_longer_text_takes_a_larger_bucket(loaded, monkeypatch):
    monkeypatch.setattr(compiled, "SMALLEST_BUCKET", 16)
    model = loaded("llama")
    for lengths in ((4,), (30,), (4,)):
        ours, eager, _ = both(model, requests(lengths), GREEDY)
        assert ours == eager
    assert compiled.bucket(16) == 16
    assert compiled.bucket(17) == 32


def test_a_plan_is_compiled_once(loaded):
    model = loaded("llama")
    first = compiled.prepare(model, 1, 40, progress=lambda _: None)
    said = []
    assert compiled.prepare(model, 1, 41, DRAWN, progress=said.append) is first
    assert not said


def test_two_interleaved_generators_do_not_share_keys(loaded):
    model, (one, other) = loaded("llama"), (requests((9,)), requests((5,)))
    first, second = (steps(model, r, GREEDY) for r in (one, other))
    pairs = zip(first, second, strict=True)
    ours = [list(side) for side in zip(*pairs, strict=True)]
    expected = [list(decoding.decode(model, r, sampling=GREEDY)) for r in (one, other)]
    assert ours == expected


def test_threads_give_the_same_tokens(loaded):
    model = loaded("llama")
    asked = [requests((n,)) for n in (3, 6, 9)]
    got = {}

    def work(i):
        got[i] = list(steps(model, asked[i], DRAWN))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == {i: list(decoding.decode(model, r, sampling=DRAWN)) for i, r in enumerate(asked)}


def test_bf16_stays_close(loaded):
    model = loaded("llama")
    other = replace(tiny("llama"), dtype="bf16")
    other.module.to(torch.bfloat16)
    assert compiled.prepare(other, 2, 40).reason is None
    assert compiled.prepare(model, 2, 40).reason is None


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 33, 200])
@pytest.mark.parametrize("widths", [(45,), (45, 3, 70)])
def test_linear_kernel(rows, dtype, columns, widths):
    fused.build_kernels()
    torch.manual_seed(0)
    x = torch.randn(rows, columns).to(dtype)
    weights = [torch.randn(n, columns).to(dtype) for n in widths]
    biases = [torch.randn(n).to(dtype) for n in widths]
    exact = x.double() @ torch.cat(weights).double().T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close = {"rtol": tolerance, "atol": 10 * tolerance}
    plain = torch.ops.llmperf.linear(x, weights, [])
    torch.testing.assert_close(plain.double(), exact, **close)
    with_bias = torch.ops.llmperf.linear(x, weights, biases)
    torch.testing.assert_close(with_bias.double(), exact + torch.cat(biases).double(), **close)


def test_products_of_one_input_become_one():
    def layer(x, a, b, c):
        linear = torch.ops.llmperf.linear
        y = linear(x, [a], []) * linear(x, [b], [])
        return linear(y, [c], []) + linear(x, [a], [c[0]])

    fused.build_kernels()
    example = [torch.randn(s) for s in ((2, 8), (8, 8), (8, 8), (8, 8))]
    graph = make_fx(layer, tracing_mode="fake")(*example)
    fused._join(graph)
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.llmperf.linear.default)
    assert [len(node.args[1]) for node in products] == [2, 1, 1]
    torch.testing.assert_close(graph(*example), layer(*example))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 7])  # queries of one key head
@pytest.mark.parametrize(("positions", "dim"), [(1, 16), (50, 20), (96, 64)])
def test_attention_kernel_with_holes_in_the_mask(dtype, sharing, positions, dim):
    fused.build_kernels()
    torch.manual_seed(0)
    query = 3 * torch.randn(2, 3 * sharing, 1, dim).to(dtype)
    key, value = (torch.randn(2, 3, positions, dim).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, 1, positions) > 0.5
    mask[..., positions // 2] = True  # a row sees at least one
    unseen = ~mask.transpose(2, 3).expand_as(value)
    value[unseen] = 1e4  # to show at once if it had any weight
    ours = torch.ops.llmperf.attend(query, key, value, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    ours = ours.transpose(1, 2).double()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "word"),
    [("mistral", "sliding window"), ("gemma2", "softcap|sliding|alike|attention")],
)
def test_a_model_that_cannot_be_compiled_falls_back_with_a_reason(loaded, case, word):
    model = loaded(case)
    ours, eager, said = both(model, requests((4, 9)), GREEDY)
    assert ours == eager
    assert len(said.splitlines()) == 1
    assert any(w in said for w in word.split("|"))


def test_without_a_static_cache_it_falls_back(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.module), "_can_compile_fullgraph", False)
    ours, eager, said = both(model, requests((4,)), GREEDY)
    assert ours == eager
    assert "static cache" in said


def test_without_a_compiler_it_falls_back(monkeypatch):
    def no_compiler():
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(fused, "build_kernels", no_compiler)
    ours, eager, said = both(tiny("llama"), requests((4,)), GREEDY)
    assert ours == eager
    assert "no C++ compiler" in said


def test_a_step_that_computes_something_else_is_refused(monkeypatch):
    right = compiled._logits
    monkeypatch.setattr(compiled, "_logits", lambda *inputs: right(*inputs) * 1.5)
    ours, eager, said = both(tiny("llama"), requests((4,)), GREEDY)
    assert ours == eager
    assert "differ" in said


@pytest.mark.gpu
def test_worker_threads_fall_back_on_a_gpu(loaded):
    model = replace(loaded("llama"), device="cuda:0")
    plans = []
    thread = threading.Thread(target=lambda: plans.append(compiled.prepare(model, 1, 40)))
    thread.start()
    thread.join()
    assert "main thread" in plans[0].reason
