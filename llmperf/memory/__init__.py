"""Memory while something runs, sampled from another process, and the measured ledger."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    channels="CHANNELS GPU_CHANNELS summary",
    sampler="INTERVAL_S Sampler",
    measured="ledger",
)
