"""Families of dense models with attention in every layer, most of them decoders like Llama: windows, ropes, biases, norms, soft-caps."""

from ftb_llm.bench.family_spec import Family, family

FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [SLIDING, SLIDING, FULL, SLIDING]
HALF = 16  # frequencies of a head of 32

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0 + 0.02 * i for i in range(HALF)], "long_factor": [1.0 + 0.3 * i for i in range(HALF)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64, **FACTORS}
LATENT = {
    **{"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"num_key_value_heads": 4, "head_dim": None},
}

LLAMA_LIKE: tuple[Family, ...] = (
    family("llama"),
    family("llama_bias", "llama", attention_bias=True, mlp_bias=True),
    family("llama_tied", "llama", tie_word_embeddings=True),
    family("llama_tp2", "llama", pretraining_tp=2),
    family("llama_mqa", "llama", num_key_value_heads=1),
    family("llama_hd48", "llama", head_dim=48),
    family("llama_linear", "llama", rope_parameters=LINEAR),
    family("llama_llama3", "llama", rope_parameters=LLAMA3),
    family("llama_yarn", "llama", rope_parameters=YARN),
    family("llama_longrope", "llama", rope_parameters=LONGROPE),
    family("llama_dynamic", "llama", rope_parameters=DYNAMIC, max_position_embeddings=64),
    family("mistral", sliding_window=None),
    family("mistral_swa128", "mistral", sliding_window=128),
    family("mistral_swa16", "mistral", sliding_window=16),
    family("ministral", layer_types=MIXED, sliding_window=16),
    family("ministral3", rope_parameters={**YARN, "llama_4_scaling_beta": 0.0}),
    family("ministral3_scale", "ministral3", rope_parameters={**YARN, "llama_4_scaling_beta": 0.3}),
    family("qwen2"),
    family("qwen2_tied", "qwen2", tie_word_embeddings=True),
    family("qwen2_swa", "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    family("qwen3"),
    family("qwen3_tied", "qwen3", tie_word_embeddings=True),
    family("arcee", rope_parameters=YARN),
    family("apertus", rope_parameters=LLAMA3, num_key_value_heads=2),
    family("bitnet"),
    family("cwm", rope_parameters=LLAMA3, sliding_window=16, layer_types=MIXED),
    family("diffllama"),
    family("doge", keep_window_size=48),
    family("ernie4_5"),
    family("exaone4", sliding_window=None, layer_types=[FULL] * 4),
    family("exaone4_swa16", "exaone4", sliding_window=16, sliding_window_pattern=2),
    family("exaone4_swa4096", "exaone4", sliding_window=4096, sliding_window_pattern=2),
    family("glm"),
    family("glm4"),
    family("helium"),
    family("hunyuan_dense", "hunyuan_v1_dense"),
    family("hyperclovax", embedding_multiplier=2.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.2),
    family("jais2"),
    family("minicpm3", **LATENT, scale_emb=2, scale_depth=1.4, dim_model_base=64),
    family("nanochat"),
    family("nemotron"),
    family("seed_oss"),
    family("smollm3", no_rope_layer_interval=2),
    family("youtu", **LATENT),
)

GEMMA_LIKE: tuple[Family, ...] = (
    family("gemma"),
    family("gemma2", query_pre_attn_scalar=32, sliding_window=4096),
    family("gemma2_attncap_only", "gemma2", attn_logit_softcapping=1.0, final_logit_softcapping=None, query_pre_attn_scalar=32),
    family("gemma2_finalcap_only", "gemma2", attn_logit_softcapping=None, query_pre_attn_scalar=32),
    family("gemma2_swa16", "gemma2", query_pre_attn_scalar=32, sliding_window=16),
    family(
        "gemma3_mm",
        "gemma3",
        text_config={
            **{"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 32},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "sliding_window": 512},
            **{"query_pre_attn_scalar": 32, "max_position_embeddings": 512},
        },
        vision_config={
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"image_size": 28, "patch_size": 14},
        },
        mm_tokens_per_image=4,
        image_token_index=310,
        boi_token_index=311,
        eoi_token_index=312,
    ),
    family("gemma3_text", query_pre_attn_scalar=32, sliding_window=16, layer_types=MIXED),
    family("gemma3_text_swa512", "gemma3_text", query_pre_attn_scalar=32, sliding_window=512, layer_types=MIXED),
    family("gemma3n_text", layer_types=MIXED, sliding_window=16, **{"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}, vocab_size_per_layer_input=320, hidden_size_per_layer_input=16, laurel_rank=8),
    family("gemma3n_text_swa512", "gemma3n_text", layer_types=MIXED, sliding_window=512, num_kv_shared_layers=0, vocab_size_per_layer_input=320, hidden_size_per_layer_input=16, laurel_rank=8),
    family("gemma4_text", layer_types=[SLIDING, SLIDING, SLIDING, FULL], sliding_window=512, vocab_size_per_layer_input=320, hidden_size_per_layer_input=16),
    family("gemma4_text_kvshared", "gemma4_text", layer_types=[SLIDING, FULL, SLIDING, FULL], sliding_window=512, num_kv_shared_layers=2, vocab_size_per_layer_input=320, hidden_size_per_layer_input=16),
    family("vaultgemma", query_pre_attn_scalar=32, sliding_window=4096),
)

OTHERS: tuple[Family, ...] = (
    family("cohere"),
    family("cohere2", sliding_window=4096),
    family("cohere2_scale1", "cohere2", logit_scale=1.0, sliding_window=4096),
    family("cohere2_swa16", "cohere2", logit_scale=0.25, sliding_window=16),
    family("granite", embedding_multiplier=2.0, logits_scaling=8.0, residual_multiplier=0.5, attention_multiplier=0.1),
    family("granite_logit1", "granite", embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.1),
    family("granite_swa", sliding_window=4096, attention_multiplier=0.18),
    family("modernbert_decoder", "modernbert-decoder", local_attention=32),
    family("modernbert_decoder_512", "modernbert-decoder", local_attention=512),
    family("olmo"),
    family("olmo_clip", "olmo", clip_qkv=1.0),
    family("olmo2"),
    family("olmo3", sliding_window=16, layer_types=MIXED),
    family("olmo3_swa4096", "olmo3", sliding_window=4096, layer_types=MIXED),
    family("persimmon"),
    family("phi"),
    family("phi_qkln", "phi", qk_layernorm=True),
    family("phi3"),
    family("phi3_longrope", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64),
    family("phi3_swa16", "phi3", sliding_window=16),
    family("phi4mini", "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}, tie_word_embeddings=True),
    family("stablelm", use_qkv_bias=True),
    family("stablelm_qk", "stablelm", qk_layernorm=True, use_parallel_residual=True),
    family("starcoder2"),
    family("starcoder2_swa16", "starcoder2", sliding_window=16),
)

DENSE = (*LLAMA_LIKE, *GEMMA_LIKE, *OTHERS)
