"""How configurations state a mixture of experts."""

from __future__ import annotations

from typing import Any

from redwood.backends.native.config_fields import Fields
from redwood.backends.native.families import Family
from redwood.backends.native.rope import float32
from redwood.backends.native.spec import MOST_LAYERS, Experts
from redwood.errors import ModelError, UnsupportedError


def experts_of(fields: Fields, family: Family) -> Experts | None:
    """Returns the mixture that a configuration of a family states, or None.

    Raises:
        ModelError: counts that make no sense.
        UnsupportedError: a router that is not computed here.
    """
    return _WAYS[family.experts](fields) if family.experts else None


def _all(fields: Fields) -> tuple[bool, ...]:
    return (True,) * fields.count("num_hidden_layers")


def _stated(
    fields: Fields,
    *,
    count: str = "num_experts",
    used: str = "num_experts_per_tok",
    ffn: str = "intermediate_size",
    layers: tuple[bool, ...] | None = None,
    **more: Any,
) -> Experts:
    """A mixture by the names of its settings; in all layers unless told otherwise."""
    return Experts(
        count=fields.count(count),
        used=fields.count(used),
        ffn=fields.count(ffn),
        layers=_all(fields) if layers is None else layers,
        **more,
    )


def _qwen(fields: Fields) -> Experts | None:
    layers, step = fields.count("num_hidden_layers"), fields.count("decoder_sparse_step")
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ModelError(f"{fields.where}: mlp_only_layers {str(dense)[:80]} is no list of layers")
    if not fields.get("num_experts"):
        return None
    mixed = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    shared: dict[str, Any] = {}
    if fields.get("model_type") in ("qwen2_moe", "qwen3_next"):
        shared = {"shared_ffn": fields.count("shared_expert_intermediate_size")}
        shared["shared_switch"] = True
    return _stated(
        fields,
        ffn="moe_intermediate_size",
        layers=mixed,
        # Qwen3-VL's text part has no such setting, and always does it.
        normalise=fields.get("model_type") == "qwen3_vl_moe_text" or fields.flag("norm_topk_prob"),
        **shared,
    )


def _qwen35(fields: Fields) -> Experts:
    return _stated(
        fields,
        ffn="moe_intermediate_size",
        shared_ffn=fields.count("shared_expert_intermediate_size"),
        shared_switch=True,
    )


def _mixtral(fields: Fields) -> Experts:
    return _stated(fields, count="num_local_experts")


def _olmoe(fields: Fields) -> Experts:
    return _stated(fields, normalise=fields.flag("norm_topk_prob"))


def _gpt_oss(fields: Fields) -> Experts:
    return _stated(fields, count="num_local_experts", biases=True)


def _gemma4(fields: Fields) -> Experts | None:
    used, width = fields.get("top_k_experts"), fields.get("moe_intermediate_size")
    count = fields.get("num_experts")
    if not fields.flag("enable_moe_block"):
        return None
    if None in (count, used, width):
        raise ModelError(f"{fields.where}: enable_moe_block without num_experts and their sizes")
    return _stated(fields, used="top_k_experts", ffn="moe_intermediate_size", beside=True)


def _deepseek(fields: Fields) -> Experts:
    """DeepSeek V3's router: sigmoids, a bias for the choice, groups of their two best."""
    _refuse_others(fields, scoring_func="sigmoid", topk_method="noaux_tc")
    return _with_shared(fields, **_router_of_v3(fields))


def _refuse_others(fields: Fields, **known: Any) -> None:
    """Refuses settings of DeepSeek's own code that Transformers' classes leave unread, where they
    ask for what those do not do."""
    for name, value in (*known.items(), ("moe_layer_freq", 1)):
        if fields.get(name, value) != value:
            raise UnsupportedError(
                f"{fields.where}: {name} {str(fields.get(name))[:80]!r} is not supported here, "
                f"only {value}"
            )


def _router_of_v3(fields: Fields) -> dict[str, Any]:
    return {
        "scoring": "sigmoid",
        "normalise": fields.flag("norm_topk_prob"),
        "groups": fields.count("n_group"),
        "groups_used": fields.count("topk_group"),
        "two_best": True,
        "choice_bias": True,
    }


def _granite(fields: Fields) -> Experts | None:
    """Granite's: the best ones, and their softmax; beside them an MLP without switch."""
    if not fields.get("num_local_experts"):
        fields.get("num_experts_per_tok")
        return None
    shared = fields.get("model_type") != "granitemoe"
    width = fields.count("shared_intermediate_size") if shared else 0
    return _stated(fields, count="num_local_experts", shared_ffn=width)


def _nemotron(fields: Fields) -> Experts | None:
    """DeepSeek V3's router; experts without gates, and one that every token has."""
    silent = ("n_routed_experts", "n_shared_experts", "norm_topk_prob", "n_group", "topk_group")
    more = ("num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
    for name in (*silent, *more, "routed_scaling_factor", "moe_latent_size"):
        fields.get(name)  # they say nothing where there is no mixture
    layers = tuple(block == "moe" for block in fields.get("layer_types"))
    if not any(layers):
        return None
    for name in ("moe_latent_size", "mlp_bias"):
        if fields.get(name):
            raise UnsupportedError(
                f"{fields.where}: {name} {str(fields.get(name))[:80]} of mixtures is not supported"
            )
    return _stated(
        fields,
        count="n_routed_experts",
        ffn="moe_intermediate_size",
        layers=layers,
        scale=float32(fields.number("routed_scaling_factor")),
        shared_ffn=fields.count("moe_shared_expert_intermediate_size"),
        **_router_of_v3(fields),
    )


def _deepseek2(fields: Fields) -> Experts:
    """DeepSeek V2's router: softmax; the best groups of experts, by their best ones."""
    method, groups = fields.get("topk_method"), (1, 1)
    if method == "group_limited_greedy":
        groups = (fields.count("n_group"), fields.count("topk_group"))
    elif method != "greedy":
        raise UnsupportedError(
            f"{fields.where}: topk_method {str(method)[:80]!r} is not supported here, only greedy "
            "and group_limited_greedy"
        )
    _refuse_others(fields, scoring_func="softmax")
    fields.get("n_group"), fields.get("topk_group"), fields.get("norm_topk_prob")
    return _with_shared(fields, normalise=False, groups=groups[0], groups_used=groups[1])


def unread_layers(fields: Fields) -> int:
    """Returns how many layers that draft stand behind the others, which computes none of them.

    Raises: ModelError for what is no count.
    """
    layers = fields.get("num_nextn_predict_layers") or 0
    if type(layers) is not int or not 0 <= layers <= MOST_LAYERS:
        raise ModelError(f"{fields.where}: num_nextn_predict_layers {str(layers)[:80]} is no count")
    return layers


def _with_shared(fields: Fields, **more: Any) -> Experts:
    """What all of DeepSeek's have: dense first layers, shared experts, a scale."""
    width = fields.count("moe_intermediate_size")
    return _stated(
        fields,
        count="n_routed_experts",
        ffn="moe_intermediate_size",
        layers=_mixed(fields),
        scale=float32(fields.number("routed_scaling_factor")),
        shared_ffn=width * fields.count("n_shared_experts"),
        **more,
    )


def _mixed(fields: Fields) -> tuple[bool, ...]:
    """The layers that are mixtures: those behind the first ones, or those that a list names."""
    layers, kinds = fields.count("num_hidden_layers"), fields.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ModelError(
                f"{fields.where}: mlp_layer_types {str(kinds)[:80]} does not fit {layers} layers"
            )
        if not {str(kind) for kind in kinds} <= {"dense", "sparse"}:
            raise UnsupportedError(
                f"{fields.where}: mlp_layer_types {str(kinds)[:80]}: only dense and sparse are "
                "known"
            )
        return tuple(kind == "sparse" for kind in kinds)
    first = fields.get("first_k_dense_replace")
    if type(first) is not int or first < 0:
        raise ModelError(f"{fields.where}: first_k_dense_replace {str(first)[:80]} is no count")
    return tuple(layer >= first for layer in range(layers))


_WAYS = {
    "qwen": _qwen,
    "qwen35": _qwen35,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "nemotron": _nemotron,
    "deepseek": _deepseek,
    "deepseek2": _deepseek2,
    "gemma4": _gemma4,
}
