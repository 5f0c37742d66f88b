"""Families before Llama, and those with layers that are no attention: state spaces, convolutions, linear attention."""

from ftb_llm.bench.family_configs_dense import FULL, LATENT
from ftb_llm.bench.family_spec import Family, Settings, family, routed

LINEAR = "linear_attention"
STATE: Settings = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
DELTA: Settings = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR],
}

OLDER: tuple[Family, ...] = (
    family("biogpt"),
    family("bloom"),
    family("codegen", rotary_dim=16),
    Family(
        name="dbrx_clip",
        model_type="dbrx",
        settings={
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128},
        },
        experts=True,
    ),
    Family(
        name="falcon_alibi",
        model_type="falcon",
        settings={"alibi": True, "num_kv_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True},
        attention="sdpa",  # transformers' eager adds the bias twice
    ),
    family("falcon_new", "falcon", new_decoder_architecture=True, num_kv_heads=2),
    family("falcon_rope", "falcon"),
    family("gpt2"),
    family("gpt2_invlayer", "gpt2", scale_attn_by_inverse_layer_idx=True),
    family("gpt2_noscale", "gpt2", scale_attn_weights=False),
    family("gpt_bigcode"),
    family("gpt_neo", attention_types=[[["global", "local"], 2]], window_size=16),
    family("gpt_neox"),
    family("gpt_neox_seq", "gpt_neox", use_parallel_residual=False),
    family("gptj", rotary_dim=16),
    family("mpt"),
    family("mpt_clip", "mpt", attn_config={"clip_qkv": 1.0}),
    family("opt", ffn_dim=192, word_embed_proj_dim=128),
    family("opt_350m", "opt", ffn_dim=192, word_embed_proj_dim=64, do_layer_norm_before=False),
    family("recurrent_gemma", attention_window_size=16, lru_width=128),
    family("rwkv", attention_hidden_size=128),
    family("xglm", ffn_dim=192),
)

HYBRID: tuple[Family, ...] = (
    family("bamba", **STATE, attn_layer_indices=[1, 3]),
    family("falcon_h1", **STATE, mamba_d_ssm=256),
    routed(
        "granitemoehybrid",
        **STATE,
        layer_types=["mamba", "attention", "mamba", "attention"],
        shared_intermediate_size=96,
        num_local_experts=4,
        attention_multiplier=0.18,
    ),
    family(
        "granitemoehybrid_attn",
        "granitemoehybrid",
        layer_types=["attention"] * 4,
        shared_intermediate_size=96,
        num_local_experts=0,
        **STATE,
        attention_multiplier=0.18,
        position_embedding_type="rope",
    ),
    routed("jamba", use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=4),
    routed(
        "kimi_linear",
        **LATENT,
        layer_types=[LINEAR, LINEAR, LINEAR, FULL],
        linear_head_dim=16,
        linear_num_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    family("lfm2", layer_types=["conv", FULL, "conv", FULL], block_auto_adjust_ff_dim=False),
    routed(
        "lfm2_moe",
        layer_types=["conv", FULL, "conv", FULL],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        num_dense_layers=1,
    ),
    family("mamba", state_size=8),
    family("mamba2", num_heads=4, head_dim=64, state_size=16, n_groups=1, chunk_size=32),
    routed("minimax", layer_types=[LINEAR, FULL, LINEAR, FULL], num_local_experts=4, block_size=32),
    family(
        "nemotron_h",
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=64,
        n_groups=1,
        chunk_size=32,
    ),
    family("qwen3_5_text", **DELTA),
    routed("qwen3_next", **DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=32),
    family(
        "zamba2",
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_key_value_heads=4,
        mamba_d_state=16,
        n_mamba_heads=4,
        chunk_size=32,
        use_mamba_kernels=False,
        num_hidden_layers=4,
        head_dim=None,
        adapter_rank=8,
    ),
)

OTHER = (*OLDER, *HYBRID)
