"""A two-layer toy whose times are round numbers of milliseconds, so that tests can show the sum.

Experts have 3 * 50 * 40 = 6000 weights and the toy format has no metadata:

    bits                        16     8      4       2
    W(b)                        12000  6000   3000    1500    bytes
    read on the GPU, 8 MB/s     1.5    0.75   0.375   0.1875  ms, launch 0.1 ms (0.2 ms at <= 4)
    read far, 0.5 * 6 MB/s      4      2      1       0.5     ms
    copied over the link, 1 MB/s  12   6      3       1.5     ms

A token crosses the link in 4 * 50 = 200 bytes = 0.2 ms both ways, after 2 * 0.05 ms of latency.
Attention takes 0.30025 ms of launches, 800 dense bytes = 0.1 ms and 0.5 us per context token:
0.45025 ms at a context of 100. (The quarter microsecond keeps every byte budget off whole numbers.)
Outside the layers: head 1 ms, engine 0.5 ms + 0.1 ms per token.
"""

from collections.abc import Sequence

import numpy as np

from ndp_gym.outcome import Outcome
from ndp_gym.plan import Placement, Plan
from ndp_gym.simulate import State, Window, initial_state, transition
from ndp_gym.specs import (
    GQA,
    FarSpec,
    Format,
    GpuSpec,
    LinkSpec,
    MoEKernel,
    MoESpec,
    Service,
    SystemSpec,
)

MODEL = MoESpec(
    name="toy",
    n_layers=2,
    hidden_size=50,
    expert_size=40,
    n_experts=4,
    top_k=2,
    vocab_size=80,
    attention=GQA(n_heads=1, n_kv_heads=1, head_dim=1),
    gate_profile=(0.75, 0.25),
    ppl=5.0,
    source="made up",
)
ONE_EXPERT_PER_TOKEN = MoESpec(
    name="toy, one layer, one of four experts",
    n_layers=1,
    hidden_size=50,
    expert_size=40,
    n_experts=4,
    top_k=1,
    vocab_size=80,
    attention=GQA(n_heads=1, n_kv_heads=1, head_dim=1),
    gate_profile=(1.0,),
    ppl=5.0,
    source="made up",
)
SYSTEM = SystemSpec(
    name="toy",
    gpu=GpuSpec(
        name="toy gpu",
        memory_bytes=10**6,
        bandwidth_bytes_per_s=8e6,
        flops_per_s=1.2e8,
        moe_kernels={"bf16": MoEKernel(0.1e-3, 1.0), "int4": MoEKernel(0.2e-3, 1.0)},
        dense_efficiency=1.0,
        kv_efficiency=1.0,
        compute_efficiency=1.0,
        attention_launch_s=0.30025e-3,
        gemm_launch_s=0.0,
        elementwise_s=0.0,
        static_w=2.0,
        j_per_byte=1e-6,
        j_per_flop=1e-9,
        source="made up",
    ),
    link=LinkSpec(
        name="toy link",
        bandwidth_bytes_per_s=1e6,
        latency_s=0.05e-3,
        j_per_byte=1e-5,
        source="made up",
    ),
    far=FarSpec(
        name="toy far device",
        memory_bytes=10**6,
        bandwidth_bytes_per_s=6e6,
        efficiency=0.5,
        flops_per_s=24e6,
        can_compute=True,
        compute_scaling="bits",
        min_tokens=2,
        static_w=1.0,
        j_per_byte=1e-6,
        j_per_flop=1e-9,
        source="made up",
    ),
    overlap=1.0,
    engine_base_s=0.5e-3,
    engine_token_s=0.1e-3,
    stored_bits=(16, 8, 4, 2),
    format=Format(
        name="mse_g128",  # by name: what kappa was fitted with
        bits_per_weight={16: 16.0, 8: 8.0, 4: 4.0, 2: 2.0},
        rel_mse={16: 0.0, 8: 0.0001, 4: 0.01, 2: 0.1},
        kernel={16: "bf16", 8: "bf16", 4: "int4", 2: "int4"},
        source="made up",
    ),
    source="made up",
)


MS = 1e-3
ALL_FAR = [[1, 1, 1, 1], [1, 1, 1, 1]]
TOKEN = [[0, 1], [2, 3]]  # layer 0 routes to experts 0 and 1, layer 1 to 2 and 3
PLENTY = 96_000  # all eight experts at 16 bit
ATT = 0.45025 * MS  # at a context of 100
OUTSIDE = (1 + 0.5 + 0.1) * MS  # head and engine of one token


def plan_of(
    tier: Sequence[Sequence[int]],
    bits: Sequence[Sequence[int]] | int = 4,
    *,
    order: Sequence[Sequence[float]] | None = None,
    service: Service | None = None,
) -> Plan:
    """A plan from nested lists; one width for all experts if ``bits`` is a number."""
    tiers = np.asarray(tier, dtype=np.uint8)
    widths = np.broadcast_to(np.asarray(bits, dtype=np.uint8), tiers.shape)
    priority = None if order is None else np.asarray(order, dtype=np.float64)
    placement = Placement(tier=tiers, bitwidth=widths.copy())
    return Plan(placement=placement, migration_order=priority, service=service)


def one_near(bits: int) -> Plan:
    """Expert 0 of layer 0 in HBM at ``bits``, all others far at 4 bits."""
    return plan_of([[0, 1, 1, 1], [1, 1, 1, 1]], [[bits, 4, 4, 4], [4] * 4])


def window_of(
    slots: Sequence[Sequence[Sequence[Sequence[int]]]],
    *,
    context: int = 99,
    length: int | None = None,
    gates: Sequence[float] = (0.75, 0.25),
) -> Window:
    """A window in which slot ``j`` decodes the tokens ``slots[j][w][layer] = experts``."""
    rows = [row for slot in slots for row in slot]
    n_rows = np.array([len(slot) for slot in slots], dtype=np.int64)
    return Window(
        expert_ids=np.asarray(rows, dtype=np.uint8),
        gate_weights=None,
        first_row=np.cumsum(n_rows) - n_rows,
        n_rows=n_rows,
        context=np.full(len(slots), context, dtype=np.int64),
        length=length or int(n_rows.max()),
        gate_profile=np.asarray(gates, dtype=np.float64),
    )


def start(
    plan: Plan,
    window: Window,
    *,
    model: MoESpec = MODEL,
    system: SystemSpec = SYSTEM,
    budget: int = PLENTY,
) -> tuple[State, Outcome]:
    """The first window of an episode."""
    return transition(
        initial_state(model, system), plan, window, model, system, budget_bytes=budget
    )


def then(
    state: State,
    plan: Plan,
    window: Window,
    *,
    model: MoESpec = MODEL,
    system: SystemSpec = SYSTEM,
    budget: int = PLENTY,
) -> tuple[State, Outcome]:
    """The window after ``state``."""
    return transition(state, plan, window, model, system, budget_bytes=budget)
