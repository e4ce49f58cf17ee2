"""llmperf: what decides how fast, and in how much memory, a language model answers on your machine.

Importing the package costs nothing: torch and transformers load when a model does.
"""

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent  # the kit's folder: notebooks, data, this package
DATA = ROOT / "data"
REFERENCE = DATA / "reference"
RUNS = DATA / "runs"
