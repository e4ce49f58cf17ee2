"""Arithmetic over a `RunSpec`, without torch: what a run must move, compute and hold.

bytes            sizes, allocator          from a `ModelShape`, to the byte
bytes and FLOPs  costs                     of a forward pass and of a whole run
time             roofline, step_time        bound, expectation, MBU, MFU, the audit
memory           ledger                    every byte of a run, named, low and high
cards            cards, fits               what fits, what does not and why
"""

from llmperf import lazy_face
from llmperf.decoding.requests import WINDOW  # noqa: F401
from llmperf.machine import GIB  # noqa: F401
from llmperf.predict.costs import run as run_cost  # noqa: F401

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "allocator": "Placed",
        "cards": "Card card card_names",
        "costs": "Cost attention_flops forward",
        "fits": "DoesNotFit Fit Knee Largest advise budget check_fits judge knee largest_batch"
        " longest_context most_processes",
        "step_time": "Latency card_ceilings latency launches matmul_shapes",
        "ledger": "LEVELS Ledger memory",
        "ledger_lines": "Line at_rest",
        "roofline": "Audit Bound audit bound decode_bound mbu mfu",
        "sizes": "buffers_bytes kv_bytes weights_bytes weights_read",
        "spec": "PLATFORMS RunSpec",
    },
)
