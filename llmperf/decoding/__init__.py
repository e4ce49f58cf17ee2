"""Requests, sampling, traces, and the decoding loops in which every strategy ends."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    requests="DEFAULT_LOOP GREEDY LOOPS PUBLISHED WINDOW Request Sampling Workload build"
    " graph_size",
    trace="Recorder",
    batch="pad",
    loops="Prepared check_loop prepare",
    generate="decode run steps",
    slots="Slots warm_up",
    graph_step="free_graphs",
)
