"""MoE-SpeQ: a quantised draft of the model knows the experts of the next k tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ndp_gym.cost import all_hbm_step_s, expert_bytes, transfer_s, uniform_distinct
from ndp_gym.plan import Plan, all_far, nearest_width
from ndp_gym.policy import Observation, PolicyContext, budget_bytes, context_entry
from ndp_gym.predictor import prefetch_at
from ndp_gym.specs import Service


@dataclass(eq=False)
class MoeSpeq:
    """arXiv 2511.14102: prefetch from an INT4 draft, k tokens ahead, k chosen by a governor.

    The governor maximises ``accepted(k) / T_cycle(k)`` with ``T_cycle = max(T_draft, T_copy of what
    is already known) + T_copy of what the draft adds + T_verify``. **mechanism**: its speeds (13.02
    tok/s on DeepSeek-V2-Lite) are of a machine that is not among the presets. Approximated, all in
    its favour: the recording fixes one token per step, so verifying k at once is in the governor
    only; neither the draft's time nor its place in HBM is charged.

    Attributes:
        bits: width of the experts.
        fidelity: share of the experts that the draft names right (published: 90.9 %).
        accepted: chance that a drafted token is accepted (assumed).
        longest: most tokens that are drafted.
    """

    label: ClassVar[str] = "mechanism"
    bits: int = 4
    fidelity: float = 0.909
    accepted: float = 0.909
    longest: int = 8

    def reset(self, context: PolicyContext) -> None:
        """Read the nominal costs."""
        self.context = context
        self.plan = all_far(context.model, context.system, self.bits)

    def __call__(self, observation: Observation) -> Plan:
        """Fetch with a per-layer cache, prefetching as many steps ahead as the governor says."""
        n_live = max(round(context_entry(observation, "n_live")), 1)
        tokens = range(1, self.longest + 1)
        cycles = [self._cycle_s(k, n_live, budget_bytes(observation)) for k in tokens]
        depth = governor(self.accepted, cycles) * self.context.model.n_layers
        service = Service(
            kind="fetch", cache="lru", scope="layer", prefetch=prefetch_at(depth, self.fidelity)
        )
        return replace(self.plan, service=service)

    def _cycle_s(self, k: int, n_live: int, budget: float) -> float:
        """Seconds to draft, copy for and verify ``k`` tokens of each live request."""
        model, system = self.context.model, self.context.system
        width = nearest_width(system, self.bits)
        size = expert_bytes(model, system.format, width)
        resident = min(budget / (size * model.n_layers * model.n_experts), 1.0)
        known, all_k = (float(uniform_distinct(model, n_live * n)) for n in (1, k))
        copy_s = float(transfer_s(size, system.link)) * (1 - resident) * model.n_layers
        contexts = np.zeros(n_live)
        draft_s = k * all_hbm_step_s(model, system, bits=width, contexts=contexts)
        verify_s = all_hbm_step_s(model, system, bits=width, contexts=np.zeros(n_live * k))
        return max(draft_s, copy_s * known) + copy_s * (all_k - known) + verify_s


def governor(accepted: float, cycles_s: Sequence[float]) -> int:
    """The k = 1, 2, ... of most tokens per second, ``cycles_s[k - 1]`` the seconds of a cycle."""
    gained = np.cumsum(accepted ** np.arange(1, len(cycles_s) + 1)) + 1  # one comes from verifying
    return int(np.argmax(gained / np.asarray(cycles_s))) + 1
