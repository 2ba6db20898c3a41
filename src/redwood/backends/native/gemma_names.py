"""Names that folders of Gemma 3n and Gemma 4 give to the roles that they alone have."""

from __future__ import annotations

PER_LAYER = {
    "ple_embed": "model.embed_tokens_per_layer.weight",
    "ple_model": "model.per_layer_model_projection.weight",
    "ple_norm": "model.per_layer_projection_norm.weight",
    "ple_gate": "per_layer_input_gate.weight",
    "ple_proj": "per_layer_projection.weight",
    "ple_post_norm": "post_per_layer_input_norm.weight",
}
ALTUP = {
    "altup_proj": "model.altup_projections.{}.weight",
    "altup_unembed": "model.altup_unembed_projections.{}.weight",
    "altup_router_norm": "altup.router_norm.weight",
    "altup_router": "altup.modality_router.weight",
    "altup_predict": "altup.prediction_coefs.weight",
    "altup_correct": "altup.correction_coefs.weight",
    "altup_scale": "altup.correct_output_scale",
    "laurel_left": "laurel.linear_left.weight",
    "laurel_right": "laurel.linear_right.weight",
    "laurel_norm": "laurel.post_laurel_norm.weight",
}
GEMMA4_EXPERTS = {
    "router_norm": "router.scale",
    "router": "router.proj.weight",
    "expert_scale": "router.per_expert_scale",
    "expert_norm": "pre_feedforward_layernorm_2.weight",
    "expert_post_norm": "post_feedforward_layernorm_2.weight",
    "dense_post_norm": "post_feedforward_layernorm_1.weight",
    **{f"expert_{part}": f"experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"shared_{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
