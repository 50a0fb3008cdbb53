"""Pure costs: bytes, seconds and joules of single operations; nothing here has state.

``docs/model.md`` has the equations with units, sources and limits. Policies, planners and
validation use these functions; the compiled kernel uses :class:`CostTable`, built from the same
ones.
"""

from ndp_gym.cost.capacity import auto_budget_bytes, check_capacity, kv_bytes, stored_bytes
from ndp_gym.cost.decode import (
    activation_transfer_s,
    all_hbm_step_s,
    attention_s,
    combine_s,
    dense_stream_s,
    engine_s,
    expert_bytes,
    far_branch_s,
    far_expert_s,
    gpu_experts_s,
    layer_contexts,
    lm_head_s,
    requantise_s,
    transfer_s,
    uniform_distinct,
)
from ndp_gym.cost.energy import (
    EnergyParts,
    decode_energy,
    dense_read_bytes,
    far_energy_j,
    gpu_energy_j,
    link_energy_j,
    static_energy_j,
)
from ndp_gym.cost.prefill import PrefillParts, prefill_parts, prefill_s
from ndp_gym.cost.table import CostTable, cost_table

__all__ = [
    "CostTable",
    "EnergyParts",
    "PrefillParts",
    "activation_transfer_s",
    "all_hbm_step_s",
    "attention_s",
    "auto_budget_bytes",
    "check_capacity",
    "combine_s",
    "cost_table",
    "decode_energy",
    "dense_read_bytes",
    "dense_stream_s",
    "engine_s",
    "expert_bytes",
    "far_branch_s",
    "far_energy_j",
    "far_expert_s",
    "gpu_energy_j",
    "gpu_experts_s",
    "kv_bytes",
    "layer_contexts",
    "link_energy_j",
    "lm_head_s",
    "prefill_parts",
    "prefill_s",
    "requantise_s",
    "static_energy_j",
    "stored_bytes",
    "transfer_s",
    "uniform_distinct",
]
