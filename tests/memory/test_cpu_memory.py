"""On the CPU: the peak resident set of a batch sweep, predicted beforehand within 10 %.

A fresh process, a random model of medium size, real prompts: nothing here is made up but the
weights.
"""

import json
import subprocess
import sys

import pytest

from llmperf import predict
from llmperf.machine import overhead
from llmperf.models import shape_of

CONFIG = dict(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=2048,
    tie_word_embeddings=True,  # an untied one is mapped from the file and read row by row
)
SWEEP = [(1, 64, 8), (16, 64, 8), (4, 128, 8), (8, 64, 24), (1, 64, 8)]  # large before small
SCRIPT = """
import json, sys
from llmperf import decoding, memory, models
import llmperf.memory.sampler
from llmperf.decoding import requests as workload
llm = models.load(sys.argv[1], dtype="fp32", device="cpu")
decoding.prepare(llm)  # a compiler that runs now would be watched as a child
peaks = []
memory.sampler.INTERVAL_S = 0.005
with memory.Sampler() as sampler:
    for batch, prompt, new in json.loads(sys.argv[2]):
        work = workload.build(llm.tokenizer, batch, prompt, new, seed=0)
        with sampler.window() as window:
            for _ in decoding.decode(llm, list(work.requests)):
                pass
        peaks.append(window["rss"]["max"])
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmperf.models import byte_tokenizer

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("medium")
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(where)
    byte_tokenizer().save_pretrained(where)
    return where


def test_the_peak_of_a_batch_sweep_within_ten_percent(folder, capsys):
    shape, before = shape_of(folder), overhead.overhead("cpu")
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(SWEEP)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    for (batch, prompt, new), peak in zip(SWEEP, json.loads(done.stdout), strict=True):
        spec = predict.RunSpec(
            shape, "fp32", rows=batch, prompt_tokens=prompt, new_tokens=new, platform="cpu"
        )
        low, high = predict.memory(spec, overhead=before).at("process")
        middle = (low + high) / 2
        print(f"{batch} x {prompt} + {new}: {peak / 2**20:.0f} MiB, predicted {middle / 2**20:.0f}")
        assert abs(middle / peak - 1) < 0.10, capsys.readouterr().out
        assert low < 1.02 * peak, "the low bound is a bound"
