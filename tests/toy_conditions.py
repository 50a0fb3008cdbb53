"""Conditions for the toy machine, whose HBM is small: everything is drawn, and changes early."""

from ndp_gym.condition import KINDS
from ndp_gym.conditions import Conditions, Disturbance, Hidden

TOY_RAND = Conditions(
    batch_sizes=(1, 2, 3), hbm_budget=(0.1, 0.6), link_bandwidth=(0.5, 2.0),
    far_bandwidth=(0.5, 2.0), far_compute=(0.5, 2.0), extra_context=(0, 50),
    quality_weights=(1.0, 4.0, 16.0), mix=0.5,
)  # fmt: skip
TOY_DRIFT = Conditions(
    batch_sizes=(1, 2, 3), hbm_budget=(0.1, 0.6), link_bandwidth=(0.5, 2.0),
    far_bandwidth=(0.5, 2.0), far_compute=(0.5, 2.0), extra_context=(0, 50),
    quality_weights=(1.0, 4.0, 16.0), mix=0.5,
    hidden=Hidden(gpu=(0.4, 1.0), far=(0.4, 1.0), link=(0.4, 1.0)),
    drift=tuple(
        Disturbance(kind=kind, factor=(0.3, 0.8), onset=(0, 3), length=(1, 4), ramp=(0, 2))
        for kind in KINDS
    ),
    domain_change=0.5,
)  # fmt: skip
