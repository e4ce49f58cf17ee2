"""Tiny random models of every family that `shapes` knows, for tests that count tensors."""

SMALL = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LATENT = dict(
    SMALL,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=12,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=8,
)
CONFIGS = {
    "gpt2": ("gpt2", dict(vocab_size=101, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "gpt2-inner": (
        "gpt2",
        dict(vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=40),
    ),
    "llama": ("llama", SMALL),
    "llama-bias-tied": (
        "llama",
        dict(SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    ),
    "mistral": ("mistral", dict(SMALL, sliding_window=8)),
    "qwen2": ("qwen2", SMALL),
    "qwen2-sliding": (
        "qwen2",
        dict(SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    ),
    "qwen3": ("qwen3", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(SMALL, head_dim=16)),
    "gemma2": ("gemma2", dict(SMALL, head_dim=16, sliding_window=8)),
    "gemma3": ("gemma3_text", dict(SMALL, num_hidden_layers=7, head_dim=16, sliding_window=8)),
    "deepseek-v2": ("deepseek_v2", dict(LATENT, q_lora_rank=None, topk_method="greedy")),
    "deepseek-v3": (
        "deepseek_v3",
        dict(LATENT, q_lora_rank=10, n_group=2, topk_group=1, attention_bias=True),
    ),
}


def build(case: str):
    """A tiny random module of the case, in fp32 on the CPU, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = CONFIGS[case]
    ids = dict(bos_token_id=1, eos_token_id=2)  # the defaults lie outside so small a vocabulary
    config = AutoConfig.for_model(family, **fields, **ids)
    return AutoModelForCausalLM.from_config(config).eval(), config
