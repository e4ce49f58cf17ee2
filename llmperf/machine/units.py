"""Constants that several parts share."""

GIB = 2**30
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our word → torch's name
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
