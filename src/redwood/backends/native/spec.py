"""What a decoder must know to compute a model: sizes, rotary frequencies, windows, switches.

`spec_hf` and `spec_gguf` make it from files; `families` says what a model family is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from redwood.backends.native.rope import Rope, float32

LANES = 16
"""Rows of a packed block: each expert begins with a block of its own."""
MOST_LAYERS = 4096
"""Far above any model: what is made per layer stays small for damaged files."""
LATENT_EPS = float32(1e-6)
"""Of the norms of latents, whatever a model sets for its other norms."""


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
        beside: they stand beside a dense MLP, each behind norms of its own; a learned factor
            multiplies the weight of each expert.
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
    beside: bool = False


@dataclass(frozen=True)
class Streams:
    """Several residuals, of which one goes through the layers (AltUp, arXiv 2301.13310).

    Attributes:
        count, active: of the residuals, and which of them.
        rank: of the residual of low rank beside attention (Laurel).
        scaled: a vector multiplies the active one before a layer's embedding is added.
    """

    count: int
    active: int
    rank: int
    scaled: bool = True


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
        query_latent: queries are made from a latent of their own; 0: from the residual.
        latent_eps: of the norms of latents.
        unread_layers: layers past the others that files hold and that are not computed, such as
            those that draft.
        kv_heads_of, head_dims, ffns: [layers], where layers differ; empty: all are alike.
        sources: [layers], the layer whose keys and values one reads, itself or an earlier one.
        keys_as_values: [layers]; True: no weights make values, they are the keys before their norm.
        value_norm: RMS norm of each head of values, without weights.
        layer_scaled: a number multiplies the residual behind each layer.
        ple, ple_vocab: width of the embeddings that each layer has of its own, 0: none; tokens
            that have them.
        cutoffs: [layers], how many standard deviations above its mean the gate of an MLP begins to
            count; -inf: all of it counts.
        streams: None: one residual.
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
    query_latent: int = 0
    latent_eps: float = LATENT_EPS
    unread_layers: int = 0
    kv_heads_of: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    ffns: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    keys_as_values: tuple[bool, ...] = ()
    value_norm: bool = False
    layer_scaled: bool = False
    ple: int = 0
    ple_vocab: int = 0
    cutoffs: tuple[float, ...] = ()
    streams: Streams | None = None
    attention_gate: bool = False
    recurrent: Recurrent | None = None
    halves: tuple[str, ...] = ()
    multipliers: Multipliers = Multipliers()

    @property
    def values(self) -> int:
        """Components of a head's values."""
        return self.value_dim or self.head_dim

    def heads_of(self, layer: int) -> tuple[int, int, int]:
        """Key-value heads of a layer, and components of a key and of a value."""
        kv_heads = self.kv_heads_of[layer] if self.kv_heads_of else self.kv_heads
        head_dim = self.head_dims[layer] if self.head_dims else self.head_dim
        return kv_heads, head_dim, self.value_dim or head_dim

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads."""
        return self.sources[layer] if self.sources else layer

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a state in the place of attention, or beside it."""
        return self.recurrent is not None and self.recurrent.layers[layer]

    def has_attention(self, layer: int) -> bool:
        """Whether a layer has attention."""
        if self.halves and self.halves[layer] == "mlp":
            return False
        beside = self.recurrent is not None and self.recurrent.beside
        return beside or not self.is_recurrent(layer)

    def holds_keys(self, layer: int) -> bool:
        """Whether a layer has keys and values of its own.

        In a model without attention the first layer counts as if it had: rows are counted by them.
        """
        if self.has_attention(layer):
            return self.source(layer) == layer
        return layer == 0 and not any(map(self.has_attention, range(self.layers)))

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def width(self, layer: int) -> int:
        """Width of the MLP that every token has in a layer; 0: none."""
        if self.halves and self.halves[layer] == "mixer":
            return 0
        if self.experts is not None and self.experts.layers[layer] and not self.experts.beside:
            return self.experts.shared_ffn
        return self.ffns[layer] if self.ffns else self.ffn
