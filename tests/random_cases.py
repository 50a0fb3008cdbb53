"""Random toy models, systems, plans and windows, small enough for the slow twin."""

from dataclasses import dataclass, replace

import numpy as np

from ndp_gym.plan import Placement, Plan
from ndp_gym.quality import QualityModel
from ndp_gym.simulate import Window
from ndp_gym.specs import (
    GQA,
    MLA,
    FarSpec,
    Format,
    GpuSpec,
    LinkSpec,
    MoEKernel,
    MoESpec,
    Prefetch,
    Service,
    SystemSpec,
)

MENUS = ((16, 8, 4, 2), (8, 4, 3), (16, 4), (8, 3, 2, 1), (16, 8, 4, 3, 2, 1), (5, 3))
CACHES = (
    Service(kind="fetch", cache="lru", scope="layer"),
    Service(kind="fetch", cache="lru", scope="global"),
    Service(kind="fetch", cache="lfu", scope="layer"),
    Service(kind="fetch", cache="lfu", scope="global"),
    Service(kind="fetch", cache="fifo", scope="layer"),
    Service(kind="fetch", cache="fifo", scope="global"),
)
KERNEL_OF = {16: "bf16", 8: "fp8", 5: "int4", 4: "int4", 3: "int4", 2: "int4", 1: "int4"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random episode: a chain of windows, each with its plan and HBM budget."""

    model: MoESpec
    system: SystemSpec
    quality: QualityModel
    windows: list[Window]
    plans: list[Plan]
    budgets: list[int]


def random_model(rng: np.random.Generator, n_layers: int, n_experts: int, top_k: int) -> MoESpec:
    """A toy model: dense layers, sliding windows, MLA and super experts come and go."""
    n_dense = int(rng.integers(0, 3)) if rng.random() < 0.5 else 0
    profile = np.sort(rng.dirichlet(np.ones(top_k)))[::-1]
    supers = {
        (int(rng.integers(n_layers)), int(rng.integers(n_experts)))
        for _ in range(int(rng.integers(0, 3)))
    }
    mla = MLA(
        n_heads=2, q_lora_rank=int(rng.choice([0, 8])), kv_lora_rank=8, nope_dim=8, rope_dim=4,
        v_dim=8,
    )  # fmt: skip
    return MoESpec(
        name="toy",
        n_layers=n_layers,
        n_dense_layers=n_dense,
        hidden_size=32 * int(rng.integers(1, 4)),
        expert_size=16 * int(rng.integers(1, 5)),
        n_experts=n_experts,
        top_k=top_k,
        shared_size=int(rng.choice([0, 16])),
        dense_size=64 if n_dense else 0,
        vocab_size=100,
        attention=mla if rng.random() < 0.3 else GQA(n_heads=2, n_kv_heads=1, head_dim=16),
        sliding_window=int(rng.choice([0, 40])),
        full_attention_every=int(rng.integers(1, 4)),
        gate_profile=tuple(float(g) for g in profile),
        super_experts=tuple(sorted(supers)),
        layer_weights=None,
        ppl=5.0,
        source="random toy",
    )


def random_system(rng: np.random.Generator) -> SystemSpec:
    """A toy system: constants drawn over a decade or more, so that every branch wins at times."""

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def sometimes(value: float) -> float:
        return value if rng.random() < 0.6 else 0.0

    menu = MENUS[int(rng.integers(len(MENUS)))]
    far_computes = bool(rng.random() < 0.8)
    kernels = {
        name: MoEKernel(
            launch_s=sometimes(log_uniform(1e-6, 1e-4)), efficiency=float(rng.uniform(0.3, 1.0))
        )
        for name in ("bf16", "fp8", "int4")
    }
    return SystemSpec(
        name="toy",
        gpu=GpuSpec(
            name="toy gpu",
            memory_bytes=10**9,
            bandwidth_bytes_per_s=log_uniform(3e8, 3e9),
            flops_per_s=log_uniform(1e9, 1e11),
            moe_kernels=kernels,
            dense_efficiency=0.8,
            kv_efficiency=0.7,
            compute_efficiency=0.4,
            attention_launch_s=sometimes(1.3e-5),
            gemm_launch_s=sometimes(3.1e-6),
            elementwise_s=sometimes(7.7e-6),
            static_w=100.0,
            j_per_byte=3e-11,
            j_per_flop=1e-12,
            source="random toy",
        ),
        link=LinkSpec(
            name="toy link",
            bandwidth_bytes_per_s=log_uniform(1e6, 3e8),
            latency_s=sometimes(log_uniform(1e-7, 1e-5)),
            j_per_byte=4e-11,
            source="random toy",
        ),
        far=FarSpec(
            name="toy far device",
            memory_bytes=10**9,
            bandwidth_bytes_per_s=log_uniform(5e7, 1e9),
            efficiency=float(rng.uniform(0.3, 1.0)),
            flops_per_s=log_uniform(1e8, 1e10),
            can_compute=far_computes,
            compute_scaling="bits" if rng.random() < 0.5 else "dequant",
            min_tokens=int(rng.integers(1, 5)),
            floor_s=log_uniform(1e-4, 2e-3) if rng.random() < 0.3 else 0.0,
            static_w=20.0,
            j_per_byte=3.6e-11,
            j_per_flop=1e-12,
            source="random toy",
        ),
        overlap=float(rng.choice([0.0, 1.0, rng.random()])),
        engine_base_s=sometimes(2.3e-5),
        engine_token_s=sometimes(1.9e-6),
        reserve_bytes=0,
        stored_bits=menu,
        format=toy_format(menu),
        requantise=far_computes and bool(rng.random() < 0.3),
        source="random toy",
    )


def toy_format(menu: tuple[int, ...]) -> Format:
    """Group metadata of a quarter bit up to 4 bits, none above; the error falls with the width."""
    return Format(
        name="toy",
        bits_per_weight={b: b if b > 4 else b + 0.25 for b in menu},
        rel_mse={b: 0.0 if b == 16 else 0.9 * 4.0**-b for b in menu},
        kernel={b: KERNEL_OF[b] for b in menu},
        source="random toy",
    )


def random_service(rng: np.random.Generator, system: SystemSpec) -> Service | None:
    """In place or balance where the far device computes, fetch with any cache; None = default."""
    pick = rng.random()
    if pick < 0.1:
        return None
    if pick < 0.3 and system.far.can_compute:
        return Service(kind="in_place")
    if pick < 0.5 and system.far.can_compute:
        rate = None if rng.random() < 0.5 else float(rng.choice([0.0, 0.27, 0.5, 1.0, 1.5]))
        return Service(kind="balance", credit=rate)
    cache = CACHES[int(rng.integers(len(CACHES)))] if pick < 0.9 else Service(kind="fetch")
    ranked = rng.choice(system.stored_bits, int(rng.integers(1, 4))) if rng.random() < 0.3 else ()
    return replace(cache, rank_bits=tuple(int(b) for b in ranked), prefetch=random_prefetch(rng))


def random_prefetch(rng: np.random.Generator) -> Prefetch | None:
    """A perfect, useless or middling predictor, less or more than a step ahead; mostly none."""
    if rng.random() < 0.65:
        return None
    return Prefetch(
        depth=int(rng.integers(1, 6)),
        recall=float(rng.choice([0.0, 1.0, rng.random()])),
        precision=float(rng.choice([1.0, rng.uniform(0.1, 1.0)])),
    )


def random_plans(
    rng: np.random.Generator, model: MoESpec, system: SystemSpec, n_windows: int
) -> list[Plan]:
    """Plans that keep most of the previous one, with tied, negative or missing priorities."""
    shape = (model.n_layers, model.n_experts)
    share_hbm = rng.uniform(0.0, 0.6)
    change = rng.choice([0.0, 0.2, 0.6, 1.0])
    tier = (rng.random(shape) > share_hbm).astype(np.uint8)
    bits = rng.choice(np.asarray(system.stored_bits, np.uint8), shape)
    service = random_service(rng, system)
    plans = []
    for _ in range(n_windows):
        new_tier = rng.random(shape) < change
        tier = np.where(new_tier, rng.random(shape) > share_hbm, tier).astype(np.uint8)
        new_bits = rng.random(shape) < 0.5 * change
        drawn = rng.choice(np.asarray(system.stored_bits, np.uint8), shape)
        bits = np.where(new_bits, drawn, bits).astype(np.uint8)
        order = rng.normal(size=shape)
        if rng.random() < 0.5:
            order = np.sign(order)  # ties
        if rng.random() < 0.2:
            service = random_service(rng, system)
        placement = Placement(tier=tier, bitwidth=bits)
        order_or_none = None if rng.random() < 0.2 else order
        plans.append(Plan(placement=placement, migration_order=order_or_none, service=service))
    return plans


def random_window(rng: np.random.Generator, model: MoESpec, batch_size: int, length: int) -> Window:
    """Skewed routing over a shared trace; slots idle, end inside the window, or run through it."""
    n_rows_total = batch_size * length + int(rng.integers(1, 8))
    favour = rng.gumbel(size=(1, model.n_layers, model.n_experts)) * rng.choice([0.5, 2.0])
    noise = rng.gumbel(size=(n_rows_total, model.n_layers, model.n_experts))
    ranked = np.argsort(-(favour + noise), axis=-1)[..., : model.top_k]
    expert_ids = ranked.astype(np.uint8 if rng.random() < 0.5 else np.int16)
    gates = None
    if rng.random() < 0.5:
        gates = -np.sort(-rng.random(expert_ids.shape), axis=-1).astype(np.float16)
    n_rows = rng.choice([0, length, int(rng.integers(0, length + 1))], batch_size)
    if rng.random() < 0.05:
        n_rows = np.zeros(batch_size)
    assert model.gate_profile is not None
    return Window(
        expert_ids=expert_ids,
        gate_weights=gates,
        first_row=rng.integers(0, n_rows_total - length + 1, batch_size),
        n_rows=n_rows.astype(np.int64),
        context=rng.integers(0, 90, batch_size),
        length=length,
        gate_profile=np.asarray(model.gate_profile),
    )


def random_case(
    seed: int,
    *,
    n_layers: int | None = None,
    n_experts: int | None = None,
    n_windows: int | None = None,
) -> Case:
    """A chain of 3 to 6 windows under changing plans and a slowly moving budget."""
    rng = np.random.default_rng(seed)
    n_layers = n_layers or int(rng.integers(1, 4))
    n_experts = n_experts or int(rng.integers(2, 9))
    n_windows = n_windows or int(rng.integers(3, 7))
    top_k = int(rng.integers(1, min(n_experts, 4) + 1))
    model, system = random_model(rng, n_layers, n_experts, top_k), random_system(rng)
    batch_size, length = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    all_at_16 = 6 * model.hidden_size * model.expert_size * n_layers * n_experts
    share = rng.uniform(0.02, 0.7)
    return Case(
        model=model,
        system=system,
        quality=QualityModel(kappa=float(rng.uniform(1.0, 4.0))),
        windows=[random_window(rng, model, batch_size, length) for _ in range(n_windows)],
        plans=random_plans(rng, model, system, n_windows),
        budgets=[int(all_at_16 * share * rng.uniform(0.9, 1.0)) for _ in range(n_windows)],
    )
