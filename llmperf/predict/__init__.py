"""Arithmetic over a `RunSpec`, without torch: what a run must move, compute and hold."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    costs="Cost WINDOW attention_flops forward matmul_shapes run_cost",
    fits="Card advise budget card judge knee known_cards largest",
    free_memory="cap_allocator free_and_held",
    ledger="GIB LEVELS Ledger Line at_rest least_context memory widest_layer",
    roofline="Audit Bound audit bound decode_bound",
    sizes="buffers kv_bytes weights_bytes weights_read",
    spec="PLATFORMS RunSpec",
)
