"""Families with routed experts, and those whose attention has latent keys and values, which mostly have both."""

from ftb_llm.bench.family_configs_dense import FULL, LATENT, MIXED, YARN
from ftb_llm.bench.family_spec import Family, Settings, family, routed

CHUNKED = "chunked_attention"
FOUR: Settings = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Settings = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
GROUPS: Settings = {"n_group": 2, "topk_group": 1}
LLAMA4: Settings = {"intermediate_size_mlp": 192, "attention_chunk_size": 16, "num_local_experts": 4, "floor_scale": 16}
MLP = ["dense", "sparse", "sparse", "sparse"]

EXPERTS: tuple[Family, ...] = (
    routed("afmoe", **FOUR, moe_intermediate_size=64, num_shared_experts=1, sliding_window=16, global_attn_every_n_layers=2),
    routed("cohere2_moe", **FOUR, logit_scale=1.0, sliding_window=4096),
    routed("deepseek_v2", **LATENT, **ROUTED, **GROUPS, topk_method="group_limited_greedy", first_k_dense_replace=1),
    routed(
        "deepseek_v2_lite",
        "deepseek_v2",
        **{**LATENT, "q_lora_rank": None, "v_head_dim": 48},
        **ROUTED,
        first_k_dense_replace=1,
    ),
    routed("deepseek_v3", **LATENT, **ROUTED, **GROUPS, first_k_dense_replace=1, rope_parameters=YARN),
    routed("deepseek_v3_samewidth", "deepseek_v3", **{**LATENT, "v_head_dim": 48}, **ROUTED, **GROUPS, first_k_dense_replace=1),
    routed("dots1", **ROUTED, first_k_dense_replace=1),
    routed("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1),
    routed("exaone_moe", **FOUR, moe_intermediate_size=64, sliding_window=4096, sliding_window_pattern=2, mlp_layer_types=MLP),
    routed("flex_olmo", **FOUR),
    routed("glm4_moe", **ROUTED, first_k_dense_replace=1, use_qk_norm=True),
    routed("glm_moe_lite", "glm4_moe_lite", **LATENT, **ROUTED, mlp_layer_types=MLP),
    routed("gpt_oss", **LOCAL, sliding_window=128),
    routed("gpt_oss_swa16", "gpt_oss", **LOCAL, sliding_window=16),
    routed("granitemoe", **LOCAL, logits_scaling=8.0, attention_multiplier=0.18),
    routed("hunyuan_moe", "hunyuan_v1_moe", num_experts=4, moe_topk=2),
    routed("hy_v3", **FOUR, moe_intermediate_size=64, mlp_layer_types=MLP),
    routed("jetmoe", kv_channels=32, num_key_value_heads=2, **LOCAL),
    routed(
        "laguna",
        **FOUR,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=32,
        mlp_layer_types=MLP,
        layer_types=MIXED,
    ),
    family("llama4_dense_chunk16", "llama4_text", **LLAMA4, moe_layers=[], layer_types=[CHUNKED, CHUNKED, CHUNKED, FULL]),
    family("llama4_moe_dense", "llama4_text", **LLAMA4, moe_layers=[], layer_types=[FULL] * 4),
    routed("llama4_text", **LLAMA4, layer_types=[CHUNKED, CHUNKED, CHUNKED, FULL]),
    routed("llama4_text_full", "llama4_text", **LLAMA4, layer_types=[FULL] * 4),
    routed(
        "longcat_flash2",
        "longcat_flash",
        **{**LATENT, "head_dim": 16},
        num_layers=2,
        ffn_hidden_size=192,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
        expert_ffn_hidden_size=64,
    ),
    routed("mellum", **FOUR, moe_intermediate_size=64, sliding_window=1024),
    routed("mimo_v2_flash", **ROUTED, head_dim=48, v_head_dim=32, sliding_window=128, layer_types=MIXED, mlp_layer_types=MLP),
    routed("minimax_m2", **LOCAL),
    routed("mixtral", **LOCAL),
    routed("mixtral_swa16", "mixtral", **LOCAL, sliding_window=16),
    routed("olmoe", **FOUR, clip_qkv=None),
    routed("phimoe", **LOCAL),
    routed("qwen2_moe", **FOUR, moe_intermediate_size=64, shared_expert_intermediate_size=32),
    routed(
        "qwen2_moe_rope",
        "qwen2_moe",
        **FOUR,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=2,
        rope_parameters=YARN,
    ),
    routed("qwen3_moe", **FOUR, moe_intermediate_size=64),
    routed("solar_open", **ROUTED),
)
