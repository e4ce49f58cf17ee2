"""llmperf: what decides how fast, and in how much memory, a language model answers on your machine.

Eleven rooms, each importing only from the rooms before it:
stats, machine, models, decoding, memory, predict, strategies, measure, findings, show, study.
"""

import gc
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent  # the kit's folder: notebooks, data, this package
DATA = ROOT / "data"
REFERENCE = DATA / "reference"
RUNS = DATA / "runs"

# torch and transformers make a million objects while they are imported. The collector would look
# through them a thousand times and lengthen every start of a notebook or process by a quarter.
if 0 < gc.get_threshold()[0] < 10_000:
    gc.set_threshold(10_000)

# NVML counts cards by PCI bus: in another order it would name other cards than CUDA does.
if os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") != "PCI_BUS_ID":
    warnings.warn("CUDA_DEVICE_ORDER is set to PCI_BUS_ID here, which NVML uses", stacklevel=2)
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"


def lazy_face(room: str, /, **files: str) -> tuple[Callable[[str], object], list[str]]:
    """`__getattr__` and `__all__` of a room's `__init__.py`, from file → the names it gives.

    A file is imported when one of its names is first used, so that `import llmperf.models` does
    not import torch.
    """
    origin = {name: file for file, names in files.items() for name in names.split()}

    def getattribute(name: str):
        if name not in origin:
            raise AttributeError(f"{room} has no {name!r}: it has {', '.join(origin)}")
        return getattr(import_module(f"{room}.{origin[name]}"), name)

    return getattribute, list(origin)
