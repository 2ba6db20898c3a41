"""What a decoder must know to compute a model: sizes, rotary frequencies, windows, switches.

`spec_hf` and `spec_gguf` make it from files; `families` says what a model family is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from redwood.backends.native.rope import MOST_HEAD_DIM, Rope, float32
from redwood.errors import ModelError, check_count

MOST_LAYERS = 4096
"""Far above any model: what is made per layer stays small for damaged files."""
MOST_EXPERTS = 1024
LATENT_EPS = float32(1e-6)
"""Of the norms of latents, whatever a model sets for its other norms."""
MOST_STREAMS = 8


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
class DecoderSpec:
    """A decoder-only model, without its weights. Floats are float32 values.

    Attributes:
        architecture: name of a family, see `families`.
        context: positions the model was made for.
        ffn: width of a dense MLP.
        activation: "silu" or "gelu_tanh", applied to the gate, or to `up` where there is no gate.
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

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    def width(self, layer: int) -> int:
        """Width of the MLP that every token has in a layer; 0: none."""
        if self.experts is not None and self.experts.layers[layer] and not self.experts.beside:
            return self.experts.shared_ffn
        return self.ffns[layer] if self.ffns else self.ffn


def check_capacity(capacity: int | None) -> None:
    """Raises ArgumentError unless `capacity` is None or at least 1."""
    if capacity is not None:
        check_count("capacity", capacity)


def check_spec(spec: DecoderSpec, where: Path) -> DecoderSpec:
    """Returns the spec if its fields fit together.

    Raises: ModelError if they do not; the message names `where`.
    """
    counts = ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "context")
    for name in counts:
        if getattr(spec, name) < 1:
            raise ModelError(f"{where}: {name} {getattr(spec, name)} must be at least 1")
    for kv_heads in {spec.kv_heads, *spec.kv_heads_of}:
        if kv_heads < 1 or spec.heads % kv_heads:
            raise ModelError(
                f"{where}: {spec.heads} heads do not share {kv_heads} key-value heads evenly"
            )
    floats = {"norm_eps": spec.norm_eps, "attention_scale": spec.attention_scale}
    floats |= {"embedding_scale": spec.embedding_scale, "logit_scale": spec.logit_scale}
    floats |= {"glu_alpha": spec.glu_alpha}
    floats |= {"attention_factor": min(rope.attention_factor for rope in spec.ropes)}
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
    check_layers(spec, where)
    for index, rope in enumerate(spec.ropes):
        heads = [spec.heads_of(layer)[1] for layer in range(spec.layers)]
        turned = [dim for dim, of in zip(heads, spec.rope_of_layer, strict=True) if of == index]
        smallest = min(turned, default=MOST_HEAD_DIM)
        if not 2 <= rope.rotary_dim <= smallest:
            raise ModelError(
                f"{where}: rotary positions of {rope.rotary_dim} components do not fit a head of "
                f"{smallest}"
            )
        if not all(0 <= freq < math.inf for freq in rope.inv_freq):
            raise ModelError(f"{where}: the rotary frequencies are not all finite and positive")
    return spec


def check_layers(spec: DecoderSpec, where: Path) -> None:
    """Raises ModelError if what is said layer by layer does not fit together."""
    for name in ("kv_heads_of", "head_dims", "ffns", "sources", "keys_as_values", "cutoffs"):
        values = getattr(spec, name)
        if values and len(values) != spec.layers:
            raise ModelError(f"{where}: {name} {str(values)[:80]} do not fit {spec.layers} layers")
    if any(not 1 <= dim <= MOST_HEAD_DIM for dim in spec.head_dims):
        raise ModelError(f"{where}: heads of {str(spec.head_dims)[:80]} components")
    if any(width < 1 for width in spec.ffns) or any(math.isnan(cut) for cut in spec.cutoffs):
        raise ModelError(f"{where}: MLPs of widths {str(spec.ffns)[:80]}, {str(spec.cutoffs)[:80]}")
    for layer, source in enumerate(spec.sources):
        fits = 0 <= source <= layer and spec.sources[source] == source
        if not fits or spec.heads_of(source) != spec.heads_of(layer):
            raise ModelError(
                f"{where}: layer {layer} cannot read keys and values of layer {source}"
            )
    streams = spec.streams
    if streams is not None and not (
        2 <= streams.count <= MOST_STREAMS and 0 <= streams.active < streams.count and spec.ple
    ):
        raise ModelError(
            f"{where}: {streams} with per-layer embeddings of {spec.ple} make no sense"
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
