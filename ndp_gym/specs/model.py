"""The shape of a Mixture-of-Experts model, and the sizes that follow from it."""

from dataclasses import dataclass

from ndp_gym.specs.checks import require_non_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class GQA:
    """Grouped-query attention (multi-head attention is ``n_kv_heads == n_heads``)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Check that every size is positive and query heads divide into groups."""
        require_positive(
            "GQA", n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim
        )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"GQA: n_heads must be a multiple of n_kv_heads={self.n_kv_heads}, "
                f"got {self.n_heads}"
            )

    def params(self, hidden_size: int) -> int:
        """Weights of the Q, K, V and output projections of one layer."""
        qkv = hidden_size * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        return qkv + self.n_heads * self.head_dim * hidden_size

    @property
    def kv_bytes(self) -> int:
        """KV-cache bytes per token and layer at 16 bit."""
        return 4 * self.n_kv_heads * self.head_dim

    @property
    def decode_flops(self) -> int:
        """Attention FLOPs per context token that are charged beside the KV read: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Multi-head latent attention; ``q_lora_rank == 0`` means a full query projection."""

    n_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        """Check that every size is positive (the query rank may be zero)."""
        require_positive(
            "MLA",
            n_heads=self.n_heads,
            kv_lora_rank=self.kv_lora_rank,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            v_dim=self.v_dim,
        )
        require_non_negative("MLA", q_lora_rank=self.q_lora_rank)

    def params(self, hidden_size: int) -> int:
        """Weights of the query, latent, up and output projections of one layer."""
        query_width = self.n_heads * (self.nope_dim + self.rope_dim)
        if self.q_lora_rank:
            query = (hidden_size + query_width) * self.q_lora_rank
        else:
            query = hidden_size * query_width
        latent = hidden_size * (self.kv_lora_rank + self.rope_dim)
        up = self.kv_lora_rank * self.n_heads * (self.nope_dim + self.v_dim)
        return query + latent + up + self.n_heads * self.v_dim * hidden_size

    @property
    def kv_bytes(self) -> int:
        """Latent-cache bytes per token and layer at 16 bit."""
        return 2 * (self.kv_lora_rank + self.rope_dim)

    @property
    def decode_flops(self) -> int:
        """FLOPs per context token of absorbed decoding in one layer."""
        return 2 * self.n_heads * (2 * self.kv_lora_rank + self.rope_dim)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A decoder-only model whose last ``n_layers`` layers route tokens to gated experts.

    ``n_layers`` counts the routed layers only; ``n_dense_layers`` dense ones come before them.
    ``shared_size`` is the total inner size of the shared experts of a layer. Layer ``i`` of all
    layers attends to the full context if ``(i + 1) % full_attention_every == 0``, the others to
    ``sliding_window`` tokens (0: every layer is full). ``gate_profile`` is the mean gate weight by
    router rank. ``super_experts`` lists (layer, expert) pairs that must not fall to 2 bit.
    ``dense_bits`` is the stored width of everything but the routed experts.

    Raises:
        ValueError: if a size is out of range or two fields disagree.
    """

    name: str
    n_layers: int
    n_dense_layers: int = 0
    hidden_size: int
    expert_size: int
    n_experts: int
    top_k: int
    shared_size: int = 0
    dense_size: int = 0
    vocab_size: int
    attention: GQA | MLA
    sliding_window: int = 0
    full_attention_every: int = 1
    tied_embedding: bool = False
    dense_bits: float = 16.0
    gate_profile: tuple[float, ...] | None = None
    super_experts: tuple[tuple[int, int], ...] = ()
    layer_weights: tuple[float, ...] | None = None
    ppl: float | None = None
    source: str = ""
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check sizes, then the fields that refer to layers, experts and ranks."""
        owner = f"model {self.name!r}"
        require_positive(
            owner,
            n_layers=self.n_layers,
            hidden_size=self.hidden_size,
            expert_size=self.expert_size,
            n_experts=self.n_experts,
            vocab_size=self.vocab_size,
            full_attention_every=self.full_attention_every,
            dense_bits=self.dense_bits,
        )
        require_non_negative(
            owner,
            n_dense_layers=self.n_dense_layers,
            shared_size=self.shared_size,
            dense_size=self.dense_size,
            sliding_window=self.sliding_window,
        )
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(
                f"{owner}: top_k must be in 1..n_experts={self.n_experts}, got {self.top_k}"
            )
        if self.n_dense_layers and not self.dense_size:
            raise ValueError(f"{owner}: dense_size must be > 0 where n_dense_layers > 0, got 0")
        self._check_routing_facts(owner)

    def _check_routing_facts(self, owner: str) -> None:
        if self.gate_profile is not None:
            if len(self.gate_profile) != self.top_k:
                raise ValueError(
                    f"{owner}: gate_profile must have top_k={self.top_k} entries, "
                    f"got {len(self.gate_profile)}"
                )
            require_positive(
                owner, **{f"gate_profile[{i}]": g for i, g in enumerate(self.gate_profile)}
            )
        if self.layer_weights is not None:
            if len(self.layer_weights) != self.n_layers:
                raise ValueError(
                    f"{owner}: layer_weights must have n_layers={self.n_layers} entries, "
                    f"got {len(self.layer_weights)}"
                )
            require_non_negative(
                owner, **{f"layer_weights[{i}]": w for i, w in enumerate(self.layer_weights)}
            )
            require_positive(owner, sum_of_layer_weights=sum(self.layer_weights))
        for layer, expert in self.super_experts:
            if not (0 <= layer < self.n_layers and 0 <= expert < self.n_experts):
                raise ValueError(
                    f"{owner}: super_experts must lie in [0, {self.n_layers}) x "
                    f"[0, {self.n_experts}), got {(layer, expert)}"
                )
        if self.ppl is not None:
            require_positive(owner, ppl=self.ppl)

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def attention_params(self) -> int:
        """Weights of the attention projections of one layer."""
        return self.attention.params(self.hidden_size)

    @property
    def router_params(self) -> int:
        """Weights of the router of one routed layer."""
        return self.hidden_size * self.n_experts

    @property
    def shared_params(self) -> int:
        """Weights of the shared experts of one routed layer."""
        return 3 * self.hidden_size * self.shared_size

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """KV-cache bytes of one token in one layer at 16 bit."""
        return self.attention.kv_bytes

    @property
    def n_all_layers(self) -> int:
        """Dense and routed layers together."""
        return self.n_dense_layers + self.n_layers

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """For each of all layers, whether it attends to the sliding window only."""
        every = self.full_attention_every if self.sliding_window else 1
        return tuple((i + 1) % every != 0 for i in range(self.n_all_layers))

    @property
    def dense_params(self) -> int:
        """All weights but the routed experts, embedding and head included."""
        routed = (self.router_params + self.shared_params) * self.n_layers
        dense = 3 * self.hidden_size * self.dense_size * self.n_dense_layers
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied_embedding else 2)
        return self.attention_params * self.n_all_layers + routed + dense + vocabulary

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but the routed experts, at ``dense_bits`` (default 16)."""
        return round(self.dense_params * self.dense_bits / 8)

    @property
    def routed_params(self) -> int:
        """Weights of all routed experts of all layers."""
        return self.n_layers * self.n_experts * self.expert_params

    @property
    def routed_bytes16(self) -> int:
        """Bytes of all routed experts at 16 bit."""
        return 2 * self.routed_params

    @property
    def total_params(self) -> int:
        """All weights of the model."""
        return self.dense_params + self.routed_params

    @property
    def active_params(self) -> int:
        """Weights read for one token: ``top_k`` experts a layer, the head, not the embedding."""
        embedding = 0 if self.tied_embedding else self.vocab_size * self.hidden_size
        routed = self.n_layers * self.top_k * self.expert_params
        return self.dense_params - embedding + routed
