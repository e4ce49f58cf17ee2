"""Presets, loading, embedded weights, quantisation, and a model's shape."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "embedded": "ModelUnavailable",
        "loading": "EMBEDDED PRESETS WEIGHTS DTYPES LoadSpec Model load load_spec front"
        " byte_tokenizer random_config",
    },
)
