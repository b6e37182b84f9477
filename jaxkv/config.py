"""Frozen configurations. They are hashable and static under jit; they validate at construction.

The decoder is one architecture with switches; a Hugging Face or GGUF configuration is translated into a
`DecoderConfig` by `jaxkv.checkpoints`, which refuses what no switch expresses.
"""

import dataclasses

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu_squared")
SSA_TERMS = ("none", "token", "position", "token+position")
SSA_FEATURES = ("shared", "linear", "mlp")
SSA_GATES = ("sigmoid", "exp-exp")
RCMHA_RELATIVE = ("learned", "sinusoidal", "none")
RCMHA_CONVOLUTIONS = ("shared", "heads", "none")
RCMHA_CONTEXTS = ("memory", "segment")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (RoFormer, arXiv 2104.09864).

    kind: one of ROPE_KINDS, or "none": nothing turns, for models whose positions come from elsewhere.
    rotary_dim: how many leading channels of a head rotate (even, <= head_dim); channel c pairs with c + rotary_dim/2.
    original_max_positions: length the unscaled frequencies were trained for (dynamic, yarn, llama3, longrope).
    attention_factor: multiplies cos and sin; None = derived by the kind's own rule (yarn, longrope).
    The remaining fields belong to the kind that their comment names, and are None elsewhere.
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float | None = None  # linear, dynamic, yarn, llama3, longrope
    original_max_positions: int | None = None  # dynamic, yarn, llama3, longrope
    attention_factor: float | None = None  # yarn, longrope
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool | None = None  # yarn: round the correction range to whole channels
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    short_factor: tuple[float, ...] | None = None  # longrope, rotary_dim/2 numbers
    long_factor: tuple[float, ...] | None = None  # longrope, rotary_dim/2 numbers

    def __post_init__(self):
        if self.kind not in (*ROPE_KINDS, "none"):
            raise ValueError(f"RoPE type {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be a positive even number, got {self.rotary_dim}")
        if self.theta <= 0:
            raise ValueError(f"RoPE theta must be positive, got {self.theta}")
        required = {
            "none": (),
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor", "original_max_positions"),
            "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow", "truncate"),
            "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
            "longrope": ("factor", "original_max_positions", "short_factor", "long_factor"),
        }[self.kind]
        missing = [name for name in required if getattr(self, name) is None]
        if missing:
            raise ValueError(f"RoPE type {self.kind!r} needs {', '.join(missing)}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise ValueError(
                    f"RoPE {name} has {len(factors)} numbers; rotary_dim/2 = {self.rotary_dim // 2} needed"
                )

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of the row, and so are fixed when its state is made."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one layer has of its own. window: keys a query sees, itself included; None = all."""

    window: int | None
    rope: RopeConfig

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"a sliding window must be at least 1 token, got {self.window}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SsaConfig:
    """Selective Self-Attention (arXiv 2411.12892): which temperatures multiply queries, keys and values, and of what.

    queries, keys, values: the terms of each one's temperature, from SSA_TERMS.
    features: what the token term reads: "shared", the GELU of the very projection that it scales; "linear", the normed
      input; "mlp", a hidden layer of its own over that input, which is no longer small.
    token_per_head, alpha_per_head: a temperature of its own for each head (query heads for queries, kv heads for keys and
      values), or one for the layer.
    gate: g(alpha), the weight of log n: the paper's "sigmoid", or the released code's "exp-exp", exp(-exp(alpha)).
    """

    queries: str = "token+position"
    keys: str = "none"
    values: str = "token"
    features: str = "shared"
    token_per_head: bool = True
    alpha_per_head: bool = False
    gate: str = "sigmoid"

    def __post_init__(self):
        accepted = dict.fromkeys(("queries", "keys", "values"), SSA_TERMS) | {
            "features": SSA_FEATURES,
            "gate": SSA_GATES,
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"ssa {name} {getattr(self, name)!r} is not supported; supported: {', '.join(values)}")
        for name in ("token_per_head", "alpha_per_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ssa {name} must be True or False, got {getattr(self, name)!r}")
        if self.queries == self.keys == self.values == "none":
            raise ValueError('ssa without any temperature is plain attention; use attention="gqa"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RcmhaConfig:
    """Relative convolutional attention (arXiv 2308.03429), and what it is compared with: without convolution RMHA, without
    the relative term Primer's MDHA.

    relative: the term of the logits that goes by distance: "learned", a table per head of vectors, which meet the query, and
      of numbers (the released code); "sinusoidal", Transformer-XL's; or "none".
    distances: length of its table: a query sees keys at distances 0 to distances - 1.
    convolution: over the time of queries, keys and values, "shared" by the heads or with filters for each of the "heads"
      (Primer); or "none". width: tokens that it spans.
    query_context: where the queries' convolution begins: "memory", with the row, as for keys and values; "segment", with each
      read (the released code), so that results depend on how the tokens arrive.
    """

    relative: str = "learned"
    distances: int | None = None
    convolution: str = "shared"
    width: int = 3
    query_context: str = "memory"

    def __post_init__(self):
        accepted = {
            "relative": RCMHA_RELATIVE, "convolution": RCMHA_CONVOLUTIONS, "query_context": RCMHA_CONTEXTS,
        }  # fmt: skip
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"rcmha {name} {getattr(self, name)!r} is not supported; supported: {', '.join(values)}"
                )
        if self.relative == self.convolution == "none":
            raise ValueError('rcmha without a convolution and a relative term is plain attention; use attention="gqa"')
        if (self.relative == "none") != (self.distances is None):
            raise ValueError(
                f"rcmha distances is the length of a relative table, and goes with one; got {self.distances} with relative"
                f" {self.relative!r}"
            )
        if self.distances is not None and self.distances < 1:
            raise ValueError(f"rcmha distances must be at least 1, got {self.distances}")
        if self.width < 2:
            raise ValueError(f"rcmha width must be at least 2 tokens, got {self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder-only transformer: Llama, Mistral, Qwen, Gemma, Phi and their kin by these switches.

    norm_offset: RMSNorm multiplies by (norm_offset + scale); 1.0 for Gemma, 0.0 elsewhere.
    query_scale: what query-key products are multiplied by before the softmax, 1/sqrt(head_dim) for most.
    embedding_scale: what token embeddings are multiplied by, sqrt(hidden_size) for Gemma, 1.0 elsewhere.
    sandwich_norms: Gemma's norms after attention and after the MLP, beside those before.
    mlp_gate: the MLP is down(activation(gate x) * up x); without a gate, down(activation(up x)).
    learned_positions: length of a table of positions, which is added to the embeddings; None = no table.
    attention: a row of the table of attention variants (`jaxkv.attention`). ssa, rcmha: what the variants of these names need.
    kernels: which implementation of the attention operations reads the cache, by name ("xla", "tpu", "interpret"; those of
      `pallas_kernels.decode_attention.IMPLEMENTATIONS`); None lets the platform choose. No property of the model: files of
      checkpoints neither hold nor set it.
    tensor_axis: of the mesh, if this is one shard of a model (`jaxkv.sharding`); not part of what the model is.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int
    norm_eps: float
    norm_offset: float
    activation: str
    query_scale: float
    embedding_scale: float
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    mlp_gate: bool = True
    learned_positions: int | None = None
    attention: str = "gqa"
    ssa: SsaConfig | None = None
    rcmha: RcmhaConfig | None = None
    kernels: str | None = dataclasses.field(default=None, repr=False)
    tensor_axis: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.layers:
            raise ValueError("a decoder needs at least one layer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if self.learned_positions is not None and not 1 <= self.max_positions <= self.learned_positions:
            raise ValueError(
                f"max_positions {self.max_positions} exceeds the table of {self.learned_positions} positions"
            )
        if (self.attention == "ssa") != (self.ssa is not None):
            raise ValueError(f'attention="ssa" and an SsaConfig go together; got {self.attention!r} and ssa={self.ssa}')
        if (self.attention == "rcmha") != (self.rcmha is not None):
            raise ValueError(
                f'attention="rcmha" and an RcmhaConfig go together; got {self.attention!r} and rcmha={self.rcmha}'
            )
        if self.rcmha is not None and self.rcmha.relative == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"sinusoidal distances need an even hidden_size, got {self.hidden_size}")
        if self.rcmha is not None and self.rcmha.distances is not None:
            far = max(min(self.max_positions, layer.window or self.max_positions) for layer in self.layers)
            if self.rcmha.distances < far:
                raise ValueError(
                    f"a relative table of {self.rcmha.distances} distances does not reach over the {far} tokens that a query"
                    " may see; lower max_positions, or give all layers a window"
                )
        for layer in self.layers:
            if layer.rope.rotary_dim > self.head_dim:
                raise ValueError(f"rotary_dim {layer.rope.rotary_dim} exceeds head_dim {self.head_dim}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def most_positions(self) -> int | None:
        """Positions that the parameters know, whatever the window of the model: beyond, nothing is defined; None = any."""
        known = [self.learned_positions]
        if self.rcmha is not None and any(layer.window is None for layer in self.layers):
            known.append(self.rcmha.distances)
        return min((n for n in known if n is not None), default=None)

    @property
    def taps(self) -> tuple[int, int] | None:
        """(tokens, channels) of each layer's bare projections that a row carries on, for a convolution over time."""
        if self.rcmha is None or self.rcmha.convolution == "none":
            return None
        queries = self.num_heads if self.rcmha.query_context == "memory" else 0
        return self.rcmha.width - 1, (queries + 2 * self.num_kv_heads) * self.head_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The distinct rotary embeddings, in order of first use; a state holds one `Rotary` for each."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))
