"""Conditions, measure(), metrics, records, arriving load, and the prediction of each run."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    condition="Condition",
    frames="frame",
    prediction="DoesNotFit check_fits predict_run spec_of",
    records="Record Store open_store",
    results="Results paired",
    session="environment measure",
)
