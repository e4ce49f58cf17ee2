"""Presets, loading, embedded weights, quantisation, and a model's shape."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    {
        "configs": "PRESETS WEIGHTS config_of shape_of",
        "loading": "EMBEDDED LoadSpec Model byte_tokenizer load load_spec other_models",
        "embedded": "ModelUnavailable",
        "quantization": "CHECKPOINT QUANTIZATIONS converted scheme stored",
        "quantize": "layer",
        "meta": "cache_argument cached_tensors",
        "shape": "CacheLayer ModelShape Tensor",
    },
)
