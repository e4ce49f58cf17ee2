"""llmperf: what decides how fast, and in how much memory, a language model answers on your machine.

Importing the package costs nothing: torch and transformers load when a model does.
"""

__version__ = "0.1.0"
