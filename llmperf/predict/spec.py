"""`RunSpec`: the run that a prediction is about."""

from dataclasses import dataclass

from llmperf.decoding.requests import LOOPS, WINDOW, graph_size
from llmperf.machine import DTYPE_BYTES
from llmperf.models import ModelShape

PLATFORMS = ("linux", "wsl2", "windows", "cpu")


@dataclass(frozen=True)
class RunSpec:
    """A run as numbers: the model, how it is held, and what goes through it.

    `rows` share a step, padded to `prompt_tokens`. `processes` each hold their own model; `threads`
    are the worker threads of a process (0: only the main thread), `streams` the CUDA streams on
    which they decode. `masks`: see `sizes.buffers`. Raises ValueError for an unknown word or a size
    that is too small.
    """

    shape: ModelShape
    dtype: str = "fp16"
    quantization: str | None = None
    rows: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 128
    loop: str = "cached"
    processes: int = 1
    threads: int = 0
    streams: int = 1
    platform: str = "linux"
    masks: bool = False

    def __post_init__(self):
        known = {"dtype": DTYPE_BYTES, "platform": PLATFORMS, "loop": LOOPS}
        for name, words in known.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"unknown {name} {value!r}: choose {', '.join(words)}")
        least = dict.fromkeys(("rows", "prompt_tokens", "new_tokens", "processes", "streams"), 1)
        least["threads"] = 0
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {low}")

    @property
    def concurrent(self) -> int:
        """Batches that run at the same time in one process."""
        return max(1, self.threads)

    @property
    def length(self) -> int:
        """Tokens of a row that the cache holds at the end; a static one has room for all."""
        return self.prompt_tokens + self.new_tokens - (self.loop != "compiled")

    @property
    def cache_room(self) -> tuple[int, int]:
        """Rows and tokens that the cache has room for at the end."""
        graph = self.loop == "compiled" and self.platform != "cpu"
        return graph_size(self.rows, self.length) if graph else (self.rows, self.length)

    @property
    def seen(self) -> int:
        """Tokens of a row in the largest forward pass."""
        longest = self.prompt_tokens + self.new_tokens - 1
        return min(WINDOW, longest) if self.loop == "recompute" else self.prompt_tokens
