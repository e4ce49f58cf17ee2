"""Arithmetic beside every measurement, under one name: import this, not its rooms.

bytes            sizes, allocator          from a `ModelShape`, to the byte
bytes and FLOPs  costs                     of a forward pass and of a whole run
time             roofline, latency         bound, expectation, MBU, MFU, the audit
memory           ledger                    every byte of a run, named, low and high
cards            cards, fits               what fits, what does not and why

None of it imports torch.
"""

from llmperf.predict.cards import GIB, Card, card
from llmperf.predict.cards import names as card_names
from llmperf.predict.costs import WINDOW, Cost, weights_read
from llmperf.predict.costs import run as run_cost
from llmperf.predict.fits import (
    DoesNotFit,
    Fit,
    Knee,
    Largest,
    advise,
    budget,
    check_fits,
    judge,
    knee,
    largest_batch,
    longest_context,
    most_processes,
)
from llmperf.predict.latency import Latency, card_ceilings, latency, launches, matmul_shapes
from llmperf.predict.ledger import LEVELS, Ledger, Line, at_rest, memory
from llmperf.predict.roofline import Audit, Bound, audit, bound, decode_bound, mbu, mfu
from llmperf.predict.sizes import buffers_bytes, kv_bytes, weights_bytes

__all__ = [
    "GIB",
    "LEVELS",
    "WINDOW",
    "Audit",
    "Bound",
    "Card",
    "Cost",
    "DoesNotFit",
    "Fit",
    "Knee",
    "Largest",
    "Latency",
    "Ledger",
    "Line",
    "advise",
    "at_rest",
    "audit",
    "bound",
    "budget",
    "buffers_bytes",
    "card",
    "card_ceilings",
    "card_names",
    "check_fits",
    "decode_bound",
    "judge",
    "knee",
    "kv_bytes",
    "largest_batch",
    "latency",
    "launches",
    "longest_context",
    "matmul_shapes",
    "mbu",
    "memory",
    "mfu",
    "most_processes",
    "run_cost",
    "weights_bytes",
    "weights_read",
]
