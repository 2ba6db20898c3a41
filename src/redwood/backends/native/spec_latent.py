"""How configurations state latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import math
from typing import NamedTuple

from redwood.backends.native.config_fields import Fields
from redwood.errors import UnsupportedError


class Latent(NamedTuple):
    """Widths of latent attention.

    `width`: of the latent. `head_dim`: of a key, of which `turning` components turn.
    `value_dim`: of a value. `scale`: multiplies the scale of attention. `query_width`: of the
    latent of queries; 0: they have none.
    """

    width: int
    head_dim: int
    turning: int
    value_dim: int
    scale: float
    query_width: int = 0


def latent_of(fields: Fields) -> Latent:
    """Returns the latent attention that a configuration states.

    Raises: ModelError and UnsupportedError, naming the setting.
    """
    where = fields.where
    asked = 0 if fields.get("q_lora_rank") is None else fields.count("q_lora_rank")
    if fields.get("attention_bias"):
        raise UnsupportedError(f"{where}: attention_bias is not supported with latent attention")
    if fields.get("rope_interleave", True) is not True:
        raise UnsupportedError(
            f"{where}: rope_interleave {fields.get('rope_interleave')}: keys whose rotary halves "
            "do not stand in turn are not supported with latent attention"
        )
    if fields.get("num_key_value_heads") != fields.get("num_attention_heads"):
        raise UnsupportedError(f"{where}: num_key_value_heads must be that of heads here")
    turning, still = fields.count("qk_rope_head_dim"), fields.count("qk_nope_head_dim")
    value_dim = fields.count("v_head_dim")
    if value_dim > turning + still:
        raise UnsupportedError(f"{where}: v_head_dim {value_dim} is wider than keys")
    fields.get("qk_head_dim"), fields.get("head_dim")
    rope, scale = fields.get("rope_parameters"), 1.0
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        mscale, factor = rope.get("mscale_all_dim") or 0, rope.get("factor", 1)
        if mscale and factor > 1:
            scale = (0.1 * mscale * math.log(factor) + 1) ** 2
    width = fields.count("kv_lora_rank")
    return Latent(width, turning + still, turning, value_dim, scale, asked)
