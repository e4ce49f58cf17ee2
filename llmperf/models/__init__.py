"""Presets, loading, embedded weights, quantisation, and a model's shape."""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    configs="PRESETS WEIGHTS config_of shape_of",
    loading="EMBEDDED LoadSpec Model byte_tokenizer load other_models tokenizer_of",
    embedded="ModelUnavailable",
    quantization="CHECKPOINT QUANTIZATIONS converted scheme stored",
    meta="cached_tensors with_cache",
    shape="CacheLayer ModelShape Tensor",
)
