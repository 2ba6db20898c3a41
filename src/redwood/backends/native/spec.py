"""What a decoder must know to compute a model: sizes, rotary frequencies, windows, switches.

`spec_hf` and `spec_gguf` make it from files; `families` says what a model family is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from redwood.backends.native.rope import Rope
from redwood.errors import ModelError, check_count

LANES = 16
"""Rows of a packed block: each expert begins with a block of its own."""
MOST_LAYERS = 4096
"""Far above any model: what is made per layer stays small for damaged files."""
MOST_EXPERTS = 1024
MOST_WIDTH = 16
"""Tokens that a short convolution sees."""
MOST_STATE = 4096
"""Heads of a recurrent layer, and components of their keys and values."""


@dataclass(frozen=True)
class Experts:
    """The layers whose MLP is a mixture of experts, of which a router chooses some for each token.

    Attributes:
        count, used: experts of a layer, and of one token.
        ffn: width of an expert.
        layers: [layers]; False: the layer has a dense MLP.
        scoring: "softmax" or "sigmoid" of the router's logits.
        normalise: the weights of the chosen add up to 1.
        scale: multiplies the weights after that.
        groups, groups_used: experts are chosen from the best groups alone.
        two_best: a group counts as its two best experts together; else as its best.
        choice_bias: a bias is added to the scores for the choice, not to the weights.
        biases: router and experts have biases.
        shared_ffn: width of an expert that every token has; 0: none.
        shared_switch: the sigmoid of a row of weights multiplies that expert.
    """

    count: int
    used: int
    ffn: int
    layers: tuple[bool, ...]
    scoring: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    two_best: bool = False
    choice_bias: bool = False
    biases: bool = False
    shared_ffn: int = 0
    shared_switch: bool = False


@dataclass(frozen=True)
class Recurrent:
    """The layers that have a state in the place of attention over all tokens.

    Attributes:
        kind: "short_conv": a convolution of gated inputs; "delta", "mamba": gated delta nets and
            Mamba-2, a convolution and then a matrix per head.
        layers: [layers]; False: the layer has none.
        width: tokens that the convolution sees, its own counted.
        channels: of the convolution.
        heads, key_heads, key_dim, value_dim: of the matrices [key_dim, value_dim]; 0: none.
        tiled: head h has the key of head h modulo key_heads; else neighbours share one.
        log_decay: files hold the logarithm of what decays, not what decays itself, negative.
        bias, conv_bias, output_bias: the first projection, the convolution and the last projection
            have biases.
        beside: these layers have attention, too, of the same input.
        norm: of Mamba-2's answers, in groups: "last", after the gate, "first" or none ("").
        times: of Mamba-2: limits of a step.
    """

    kind: str
    layers: tuple[bool, ...]
    width: int
    channels: int
    heads: int = 0
    key_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    tiled: bool = False
    log_decay: bool = False
    bias: bool = False
    conv_bias: bool = False
    output_bias: bool = False
    beside: bool = False
    norm: str = "last"
    times: tuple[float, float] = (0.0, math.inf)


@dataclass(frozen=True)
class Multipliers:
    """What multiplies parts of every layer.

    Attributes:
        attention, state, mlp: what attention, recurrent layers and MLPs add to the residual.
        attention_input, state_input: what attention and recurrent layers read.
        state_parts: of Mamba-2: gates, values, keys, queries and times as they are projected.
        mlp_gate: the gate of an MLP, before its activation.
    """

    attention: float = 1.0
    state: float = 1.0
    mlp: float = 1.0
    attention_input: float = 1.0
    state_input: float = 1.0
    state_parts: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    mlp_gate: float = 1.0


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only model, without its weights. Floats are float32 values.

    Attributes:
        architecture: name of a family, see `families`.
        context: positions the model was made for.
        ffn: width of a dense MLP.
        activation: "silu", "gelu_tanh" or "relu2", the square of what is positive; applied to the
            gate, or to `up` where there is no gate.
        attention_scale: multiplies the product of query and key.
        attention_softcap: c in c * tanh(score / c), after the scale; 0: none.
        logit_softcap: the same for the logits; 0: none.
        embedding_scale: multiplies the embedding of a token.
        windows: [layers]; 0: full attention; w: a key is visible iff query position - key
            position < w.
        rope_of_layer: [layers], indices into `ropes`, -1: no positions; for Gemma 3 `ropes` is
            that of full layers, then that of sliding ones.
        tied: the output head is the embedding.
        attention_bias: queries, keys and values have a bias.
        output_bias: the projection after attention has a bias.
        qk_norm: RMS norm of each head of queries and keys, before rotary positions.
        qk_norm_whole: that norm takes all heads together.
        post_norms: norms after attention and after the MLP, before the residual is added.
        pre_norms: norms before attention and before the MLP.
        parallel: attention and MLP read the same norm, and both are added to the residual.
        layer_norm: norms subtract the mean; not those of queries and keys.
        norm_bias: norms before attention, MLP and head have a bias.
        logit_scale: multiplies the logits.
        gated: the MLP multiplies by a gate.
        mlp_bias: all projections of a dense MLP have a bias.
        sinks: a learned score beside those of the keys takes its share of attention.
        glu_limit, glu_alpha: gate and up are held within limits, x * sigmoid(alpha * x) times
            up + 1; a limit of 0: none of that.
        experts: None: all layers have dense MLPs.
        value_dim: components of a head's values; 0: as of its keys.
        latent: keys and values are made from a latent of this width; 0: from the residual.
        attention_gate: the sigmoid of a projection multiplies what attention says.
        recurrent: None: all layers have attention.
        halves: [layers], "mixer" of layers without MLP, "mlp" of those with nothing else; empty:
            all have both.
        multipliers: of parts of every layer.
    """

    architecture: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    norm_eps: float
    activation: str
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    embedding_scale: float
    windows: tuple[int, ...]
    rope_of_layer: tuple[int, ...]
    ropes: tuple[Rope, ...]
    tied: bool
    attention_bias: bool
    output_bias: bool
    qk_norm: bool
    post_norms: bool
    qk_norm_whole: bool = False
    pre_norms: bool = True
    parallel: bool = False
    layer_norm: bool = False
    norm_bias: bool = False
    logit_scale: float = 1.0
    gated: bool = True
    mlp_bias: bool = False
    sinks: bool = False
    glu_limit: float = 0.0
    glu_alpha: float = 1.0
    experts: Experts | None = None
    value_dim: int = 0
    latent: int = 0
    attention_gate: bool = False
    recurrent: Recurrent | None = None
    halves: tuple[str, ...] = ()
    multipliers: Multipliers = Multipliers()

    @property
    def values(self) -> int:
        """Components of a head's values."""
        return self.value_dim or self.head_dim

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a state in the place of attention, or beside it."""
        return self.recurrent is not None and self.recurrent.layers[layer]

    def has_attention(self, layer: int) -> bool:
        """Whether a layer has attention."""
        if self.halves and self.halves[layer] == "mlp":
            return False
        beside = self.recurrent is not None and self.recurrent.beside
        return beside or not self.is_recurrent(layer)

    @property
    def attention_layers(self) -> int:
        """Layers with keys and values; a model without any keeps one's, to count rows by."""
        return max(1, sum(self.has_attention(layer) for layer in range(self.layers)))

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def width(self, layer: int) -> int:
        """Width of the MLP that every token has in a layer; 0: none."""
        if self.halves and self.halves[layer] == "mixer":
            return 0
        if self.experts is not None and self.experts.layers[layer]:
            return self.experts.shared_ffn
        return self.ffn


def check_capacity(capacity: int | None) -> None:
    """Raises ArgumentError unless `capacity` is None or at least 1."""
    if capacity is not None:
        check_count("capacity", capacity)


def check_spec(spec: DecoderSpec, where: Path) -> DecoderSpec:
    """Returns the spec if its fields fit together.

    Raises: ModelError if they do not; the message names `where`.
    """
    counts = ["vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "context"]
    if set(spec.halves) == {"mixer"}:
        counts.remove("ffn")
    for name in counts:
        if getattr(spec, name) < 1:
            raise ModelError(f"{where}: {name} {getattr(spec, name)} must be at least 1")
    if spec.heads % spec.kv_heads:
        raise ModelError(
            f"{where}: {spec.heads} heads do not share {spec.kv_heads} key-value heads evenly"
        )
    floats = {"norm_eps": spec.norm_eps, "attention_scale": spec.attention_scale}
    floats |= {"embedding_scale": spec.embedding_scale, "logit_scale": spec.logit_scale}
    floats |= {"glu_alpha": spec.glu_alpha}
    factors = [rope.attention_factor for rope in spec.ropes]
    floats |= {"attention_factor": min(factors, default=1.0)} | _multipliers(spec)
    for name, value in floats.items():
        if not (0 < value < math.inf or (name == "norm_eps" and value == 0)):
            raise ModelError(f"{where}: {name} {value} must be positive and finite")
    for cap in (spec.attention_softcap, spec.logit_softcap, spec.glu_limit):
        if not 0 <= cap < math.inf:
            raise ModelError(f"{where}: a soft cap of {cap} must be positive and finite")
    if not len(spec.windows) == len(spec.rope_of_layer) == spec.layers or min(spec.windows) < 0:
        raise ModelError(f"{where}: the windows {spec.windows} do not fit {spec.layers} layers")
    if spec.experts is not None:
        _check_experts(spec.experts, spec.layers, where)
    if spec.recurrent is not None:
        _check_recurrent(spec.recurrent, spec.layers, where)
    for rope in spec.ropes:
        if not 2 <= rope.rotary_dim <= spec.head_dim:
            raise ModelError(
                f"{where}: rotary positions of {rope.rotary_dim} components do not fit a head of "
                f"{spec.head_dim}"
            )
        if not all(0 <= freq < math.inf for freq in rope.inv_freq):
            raise ModelError(f"{where}: the rotary frequencies are not all finite and positive")
    return spec


def _multipliers(spec: DecoderSpec) -> dict[str, float]:
    held = dict(vars(spec.multipliers))
    parts = held.pop("state_parts")
    held |= {f"state_parts {part}": by for part, by in enumerate(parts)}
    return {f"the multiplier {name}": by for name, by in held.items()}


def _check_recurrent(recurrent: Recurrent, layers: int, where: Path) -> None:
    if len(recurrent.layers) != layers or not any(recurrent.layers):
        raise ModelError(f"{where}: the recurrent layers do not fit {layers} layers")
    if not 1 < recurrent.width <= MOST_WIDTH:
        raise ModelError(
            f"{where}: a convolution over {recurrent.width} tokens; 2 to {MOST_WIDTH} are supported"
        )
    if recurrent.kind == "short_conv":
        return
    for name in ("heads", "key_heads", "key_dim", "value_dim"):
        if not 1 <= getattr(recurrent, name) <= MOST_STATE:
            raise ModelError(
                f"{where}: recurrent layers: {name} {getattr(recurrent, name)} must be in "
                f"1..{MOST_STATE}"
            )
    if recurrent.heads % recurrent.key_heads:
        raise ModelError(
            f"{where}: recurrent layers: {recurrent.heads} heads do not share "
            f"{recurrent.key_heads} key heads evenly"
        )
    if not (0 <= recurrent.times[0] <= recurrent.times[1] and recurrent.times[0] < math.inf):
        raise ModelError(f"{where}: recurrent layers: no time is within {recurrent.times}")
    keys = 2 * recurrent.key_heads * recurrent.key_dim
    if recurrent.channels != keys + recurrent.heads * recurrent.value_dim:
        raise ModelError(
            f"{where}: recurrent layers: {recurrent.channels} channels are not those of the heads"
        )


def _check_experts(experts: Experts, layers: int, where: Path) -> None:
    for name in ("count", "used", "ffn", "groups", "groups_used"):
        if getattr(experts, name) < 1:
            raise ModelError(
                f"{where}: experts: {name} {getattr(experts, name)} must be at least 1"
            )
    count, groups = experts.count, experts.groups
    if count > MOST_EXPERTS:
        raise ModelError(f"{where}: {count} experts; at most {MOST_EXPERTS} are supported")
    if count % groups or experts.groups_used > groups:
        raise ModelError(
            f"{where}: {count} experts are not {groups} groups, of which "
            f"{experts.groups_used} count"
        )
    if experts.used > count // groups * experts.groups_used:
        raise ModelError(f"{where}: a token cannot have {experts.used} experts of {count}")
    if not 0 < experts.scale < math.inf:
        raise ModelError(f"{where}: the experts' scale {experts.scale} must be positive and finite")
    if experts.shared_ffn < 0 or len(experts.layers) != layers:
        raise ModelError(f"{where}: the experts {experts} do not fit {layers} layers")
