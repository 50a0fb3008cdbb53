"""Lanes of one simulator share code and threads, nothing else."""

from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ndp_gym.batch import Simulator
from ndp_gym.packing import stack_windows
from ndp_gym.simulate import initial_state, transition
from tests.random_cases import random_case


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_lanes_run_together_as_each_would_alone(seed: int) -> None:
    case, rng = random_case(seed, n_windows=4), np.random.default_rng(seed)
    slow = replace(case.system.link, bandwidth_bytes_per_s=2e5)
    systems = [case.system, case.system, replace(case.system, link=slow), case.system]
    shape = case.plans[0].placement.tier.shape
    plans, orders = case.plans, rng.normal(size=(4, *shape))
    together = Simulator(case.model, case.system, case.quality, n_lanes=4)
    alone = [initial_state(case.model, system) for system in systems]
    for lane, system in enumerate(systems):
        together.reset(lane, system)
    for recording in case.windows:
        batch_size = recording.n_rows.size
        windows = [
            replace(recording, n_rows=rng.integers(0, recording.length + 1, batch_size))
            for _ in systems
        ]
        out = together.advance(
            tier=np.stack([plan.placement.tier for plan in plans]),
            bits=np.stack([plan.placement.bitwidth for plan in plans]),
            order=orders,
            services=[plan.service or case.system.default_service for plan in plans],
            windows=stack_windows(windows),
            length=recording.length,
            budgets=np.array(case.budgets),
        )
        for lane, system in enumerate(systems):
            alone[lane], single = transition(
                alone[lane],
                replace(plans[lane], migration_order=orders[lane]),
                windows[lane],
                case.model,
                system,
                budget_bytes=case.budgets[lane],
                quality=case.quality,
            )
            for f in fields(single):
                both = getattr(out.lane(lane), f.name), getattr(single, f.name)
                np.testing.assert_allclose(*both, rtol=1e-12, atol=0, err_msg=f.name)
            now = together.get_state(lane)
            for name in ("hbm_bits", "far_bits", "cache_bits", "queue", "head_bytes", "tick"):
                np.testing.assert_array_equal(getattr(now, name), getattr(alone[lane], name))
        plans = plans[1:] + plans[:1]
