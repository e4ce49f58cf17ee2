"""The memory calculator as one page that needs neither a kernel nor a network.

From numbers of each model the page computes what `predict.memory` does for the loop `cached`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from importlib.resources import files

from tqdm import tqdm

from llmperf import models, predict
from llmperf.machine import DTYPE_BYTES, GIB, PROBES, ask, platform_word, rates
from llmperf.machine.description import cached_measurement
from llmperf.predict import ledger
from llmperf.show.widgets import QUANTIZATIONS, Question

COMPUTER = "this computer (free memory)"


def calculator_page(names: Sequence[str] = ()) -> str:
    """The page as HTML, for the models named (preset, hub id, folder or config.json) and all
    presets. Reading the shapes of all presets takes about half a minute once. Raises ValueError
    for a model that is not known."""
    template = files("llmperf.show").joinpath("web", "calculator.html").read_text("utf-8")
    numbers = json.dumps(_numbers(names), separators=(",", ":"))
    return template.replace("DATA", numbers.replace("<", "\\u003c"))  # ends no script


def _numbers(names: Sequence[str]) -> dict:
    """All numbers of the page; those of a model by dtype and quantization."""
    first = asdict(Question(models.EMBEDDED, "bf16", card=COMPUTER, platform="cpu"))
    cards = [_this_computer(), *predict.known_cards()]
    for found in reversed(ask(PROBES["gpus"])[0] or []):  # the first card is asked for
        if not found["name"] or not found["memory_total_bytes"]:  # NVML does not say
            continue
        card = predict.card(found["name"], found["memory_total_bytes"] / GIB)
        cards.append(replace(card, name=f"{found['name']} (this machine)"))
        first = asdict(Question(card=cards[-1].name, platform=platform_word("cuda")))
    if names:
        first["model"] = names[0]
    every = dict.fromkeys([*names, *models.PRESETS])
    every = tqdm(every, desc="shapes of models", leave=False, disable=None)  # on a terminal only
    return {
        "first": first,
        "cards": {c.name: [c.memory_gib, c.bandwidth_bytes_s] for c in cards},
        "models": {name: _of_model(models.shape_of(name)) for name in every},
        "item": DTYPE_BYTES,
        "quantizations": QUANTIZATIONS,
        "computer": COMPUTER,
        "overhead": ledger.OVERHEAD_GIB,
        "idle": ledger.IDLE_GIB,
        "workspace": [ledger.CUBLAS_WORKSPACE, ledger.CUBLAS_WORKSPACE_HOPPER],
        "segments": 2 * (ledger.LARGE_SEGMENT + ledger.ROUND_LARGE),
    }


def _this_computer() -> predict.Card:
    """What of its memory is free, and its bandwidth: the kept ceiling, or measured in a second."""

    def measure(device: str) -> dict:
        found = rates.read_bandwidth(device, repeats=3, share=0.5)
        return {"read_bytes_per_s": found, "reason": "the other ceilings were not measured"}

    bandwidth = cached_measurement("ceilings", "cpu", measure)["read_bytes_per_s"]["median"]
    return predict.Card(COMPUTER, round(PROBES["ram_available_bytes"]() / GIB, 2), bandwidth)


def _of_model(shape: models.ModelShape) -> dict:
    held = {}
    for dtype in DTYPE_BYTES:
        buffers = sum(predict.buffers(shape, dtype))
        for word in QUANTIZATIONS:
            how = (shape, dtype, None if word == "as stored" else word)
            placed = predict.at_rest(*how)
            rounding = placed.allocated - placed.requested
            spare = placed.reserved - placed.allocated
            weights, read = predict.weights_bytes(*how), predict.weights_read(*how)
            held[f"{dtype} {word}"] = [weights, buffers, rounding, spare, read]
    return {
        "held": held,
        "hidden": shape.hidden,
        "vocab": shape.vocab,
        "positions": shape.max_positions,
        "widths": predict.widest_layer(shape),
        "copies": shape.step_copies,
        "cache": [[n, *astuple(layer)] for layer, n in Counter(shape.cache).items()],
    }
