"""Requests, sampling, traces, and the decoding loops in which every strategy ends."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "loops": "LOOPS WINDOW Batch cached check_loop decode last_column pad positions recompute"
        " run steps",
    },
)
