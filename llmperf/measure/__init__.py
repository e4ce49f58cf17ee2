"""Conditions, measure(), metrics, records, arriving load, and the prediction of each run."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "beside": "environment",
        "condition": "Condition",
        "frames": "frame",
        "records": "Record Store open_store",
        "results": "Results",
        "session": "measure",
    },
)
