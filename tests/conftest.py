"""Fixtures: the embedded model, a tiny random one; a skip with a reason where there is no GPU;
long tests only when asked for; fewer repeats in the notebooks that nbval runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers that tests of several rooms use


# A study runs the notebooks as they are; nbval with at most so much of each.
FEWER = {"repeats": 2, "rounds": 1, "runs": 6, "pairs": 4, "requests": 20, "new_tokens": 8,
         "batch_sizes": [1, 2, 8], "threads": [1, 2, 5], "tasks": [1, 5]}  # fmt: skip


def pytest_collection_modifyitems(config, items):
    for cell in (item.cell for item in items if hasattr(item, "cell")):  # of nbval
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(
                f"\n{name} = {count}"
                for name, count in FEWER.items()
                if f"\n{name}: " in cell.source
            )
    long = pytest.mark.skip(reason="takes minutes: run it with pytest -m long")
    for item in items:
        if item.get_closest_marker("long") and "long" not in config.option.markexpr:
            item.add_marker(long)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def embedded():
    """SmolLM2-135M in fp32 on the CPU: real trained weights."""
    from llmperf import models

    return models.load("smollm2-135m", dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a random two-layer Llama and a byte tokenizer, as a user's own model."""
    import tiny_models

    return tiny_models.save_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model, loaded in fp32 on the CPU."""
    from llmperf import models

    return models.load(str(tiny_folder), dtype="fp32", device="cpu")
