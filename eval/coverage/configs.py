"""Small configs of transformers, whatever the type: the sizes that nearly all config classes share, made small.

A config class that cannot be as small as that is given only fewer layers, and at last what it has by default.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

Sizes = dict[str, Any]

VOCABULARY = 200
DEPTHS: Sizes = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers", "num_attention_layers"), 2),
    **dict.fromkeys(
        (
            "vocab_size",
            "text_vocab_size",
            "src_vocab_size",
            "tgt_vocab_size",
            "vocab_size_per_layer_input",
            "entity_vocab_size",
        ),
        VOCABULARY,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 256),
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("max_target_positions", "context_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
}
WIDTHS: Sizes = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "encoder_hidden_size"), 64),
    **dict.fromkeys(("decoder_hidden_size", "embedding_size", "out_hidden_size", "projection_dim"), 64),
    **dict.fromkeys(("text_hidden_size", "audio_hidden_size", "condition_dim", "codebook_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("ffn_dim", "d_ff", "shared_expert_intermediate_size", "decoder_intermediate_size"), 64),
    **dict.fromkeys(("n_inner", "hidden_dim", "dim_feedforward", "encoder_feedforward_dim"), 64),
    "embed_dim": 96,
    "sliding_window": 32,  # of which a text holds several
    "num_queries": 10,
    "output_channels": 64,
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 8,
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size"), 16),
}
IMAGES: Sizes = {"image_size": 52, "patch_size": 4}  # an odd number of patches
# None by default, which builds no model
NEEDED = (
    "vocab_size",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "head_dim",
    "num_key_value_heads",
)
TOKEN = re.compile(r"token_(id|index)$")
IMAGE_TOKEN = ("image_token_id", "image_token_index")
FULL_LAYER = "full_attention"
SECTIONS = re.compile("vl|glm|omni|qwen|ernie|cosmos|ocr")  # in the names of types that may have them

# What no rule can know.
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SERIES = {"prediction_length": 8, "lags_sequence": [1]}
SPECIAL: dict[str, Sizes] = {
    "granitemoehybrid": HYBRID,
    "cohere_compass_text": {"num_hidden_layers": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "dots3_note_text": {
        "num_hidden_layers": 4,
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 32),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 16),
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "num_hidden_layers": 4},
    "sam2_hiera_det_model": {"hidden_size": 96, "image_size": [128, 128]},
    "sam_vision_model": {"num_pos_feats": 32},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "sam2_prompt_encoder": {"image_size": 128, "patch_size": 16},
    "sam2_vision_model": {"fpn_hidden_size": 64, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "cosmos3_edge_text": {"head_dim": 128},
    "hy_v4_vl_text": {"qk_rope_head_dim": 64},
    # as the pretrained ones
    "beit": {"use_relative_position_bias": True},
    "data2vec-vision": {"use_relative_position_bias": True},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
    "vitdet": {"use_relative_position_embeddings": True},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "esm": {"pad_token_id": 1},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "emu3": {"vocabulary_map": {"<image>": 150}},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]},
}


def small_configs(cls: type[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """Configs of a class, the smallest first; one that the class does not take is left out.

    Raises:
        Exception: what the class raised on the smallest, where it takes none.
    """
    first: Exception | None = None
    none = True
    for sizes in (DEPTHS | WIDTHS | IMAGES, DEPTHS | WIDTHS, DEPTHS, {}):
        try:
            config = _shrink(cls, sizes)
        except Exception as error:  # whatever a class raises on values that do not suit it
            first = first or error
            continue
        none = False
        yield config
    if none and first is not None:
        raise first


def _shrink(cls: type[PreTrainedConfig], sizes: Sizes) -> PreTrainedConfig:
    """The class with those of the sizes that it has, in the configs within it too."""
    if not sizes:
        return cls()
    given: Sizes = {}
    token = VOCABULARY
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        if name in sizes and (isinstance(default, int) or (default is None and name in NEEDED)):
            given[name] = sizes[name]
        elif name == "depths" and isinstance(default, (list, tuple)):
            given[name] = [1] * len(default)
        elif name == "image_size" and name in sizes and isinstance(default, (list, tuple)):
            given[name] = [sizes[name]] * len(default)
        elif name == "conv_dim" and isinstance(default, (list, tuple)) and "hidden_size" in sizes:
            given[name] = [32] * len(default)
        elif name in IMAGE_TOKEN or (TOKEN.search(name) and type(default) is int and default >= VOCABULARY - 40):
            token -= 1
            given[name] = token
    if "kv_lora_rank" in given:  # latent attention has keys for every head
        given["num_key_value_heads"] = given["num_attention_heads"]
    whole = cls()
    for name in cls.sub_configs:
        if isinstance(part := getattr(whole, name, None), PreTrainedConfig):
            given[name] = _shrink(type(part), sizes)
    given |= SPECIAL.get(cls.model_type, {})
    config = cls(**given)
    types = getattr(config, "layer_types", None)
    if types and FULL_LAYER in (getattr(whole, "layer_types", None) or ()) and FULL_LAYER not in types:
        config = cls(**given | {"layer_types": [*types[:-1], FULL_LAYER]})
    _fit_sections(config)
    return config


def _fit_sections(config: PreTrainedConfig) -> None:
    """Rotary sections of time, height and width that together are as long as the rotary part of a head."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not SECTIONS.search(config.model_type):
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
