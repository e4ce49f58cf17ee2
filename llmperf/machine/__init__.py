"""What this machine is, what it can do at most, and what a fresh process takes of its memory."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    child="SLICE_S Child ChildDied Parent",
    description="busy busy_warning cache_dir caption cores describe platform_word slug"
    " usable_cores",
    probes="PROBES ask",
    gpu="no_cuda",
    units="DTYPES DTYPE_BYTES GIB Unknown first_line significant",
)
