"""Tiny random models of many decoders of transformers, as data, for tests that count tensors."""

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

# For every decoder: those of these fields that its configuration has.
COMMON = dict(
    SMALL,
    num_local_experts=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    sliding_window=8,
    head_dim=8,
    ffn_dim=48,
    d_model=32,
    n_layers=4,
    n_heads=4,
    n_embd=32,
    n_layer=4,
    n_head=4,
    n_positions=64,
    max_seq_len=64,
    d_ff=48,
    rotary_dim=4,
    word_embed_proj_dim=32,
    state_size=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_heads=4,
    num_layers=4,
)
USUAL = """
afmoe apertus arcee aria_text bitnet bloom codegen cohere cohere2 cwm diffllama doge ernie4_5
ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_mamba flex_olmo gemma gemma2 gemma3_text glm
glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 iquestcoder jais2 lfm2 llama
llama4_text mamba mimo_v2_flash minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder
mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2
vaultgemma xglm
"""
SSM = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
# Type → fields that differ from COMMON.
DECODERS = {
    **dict.fromkeys(USUAL.split(), {}),
    "bamba": dict(SSM, attn_layer_indices=[1, 3]),
    "deepseek_v2": dict(LATENT, q_lora_rank=None, topk_method="greedy"),
    "deepseek_v3": dict(LATENT, q_lora_rank=10, n_group=2, topk_group=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=8),
    "granitemoehybrid": dict(SSM, layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_dt_rank=4),
    "mamba2": dict(num_heads=4, head_dim=16, expand=2, n_groups=1),
}


def config_of(kind: str, fields: dict):
    """The configuration of a tiny decoder; the fields of COMMON that it has, and `fields`."""
    from transformers import AutoConfig

    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    usual = AutoConfig.for_model(kind)
    known = {*usual.to_dict(), *type(usual).attribute_map}
    common = {k: v for k, v in COMMON.items() if k in known and not set(SMALL) <= set(fields)}
    if "sliding_window" in common and not usual.sliding_window:
        del common["sliding_window"]
    return AutoConfig.for_model(kind, **{**common, **fields, **ids})


def build(case: str):
    """A tiny random module of the case, in fp32 on the CPU, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = CONFIGS[case]
    ids = dict(bos_token_id=1, eos_token_id=2)  # the defaults lie outside so small a vocabulary
    config = AutoConfig.for_model(family, **fields, **ids)
    return AutoModelForCausalLM.from_config(config).eval(), config


def save_llama(folder):
    """A random two-layer Llama with a byte tokenizer in `folder`, as a user's own model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmperf.models import byte_tokenizer

    torch.manual_seed(0)
    sizes = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    # far from uniform, so that a wrong input shows in the tokens
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
