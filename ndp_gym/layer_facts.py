"""What the planner knows of N lanes, each with a nominal system and a quality weight of its own."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym.planners import Facts

FloatArray = NDArray[np.float64]


class LaneFacts:
    """`Facts` of N lanes with a leading lane axis; stored widths and the model are shared.

    Attributes:
        shared: facts of one lane, for all that does not depend on speeds and weights.
        gpu_weight_s, gpu_launch_s, far_weight_s, far_token_s, copy_s: [N, NB].
        layer_s: [N, L].
        gpu_token_s, link_latency_s, activation_token_s, far_floor_s, kv_token_s, dense_layer_s,
            head_s, engine_base_s, engine_token_s: [N]; see `ndp_gym.cost.CostTable`.
    """

    def __init__(self, facts: Facts, n_lanes: int) -> None:
        """The same ``facts`` for every lane."""
        self.shared, self._n_lanes = facts, n_lanes
        table = facts.table
        self.gpu_weight_s = self._repeated(table.gpu_weight_s)
        self.gpu_launch_s = self._repeated(table.gpu_launch_s)
        self.far_weight_s = self._repeated(table.far_weight_s)
        self.far_token_s = self._repeated(table.far_token_s)
        self.copy_s = self._repeated(table.copy_s)
        self.layer_s = self._repeated(table.layer_s)
        self.gpu_token_s = self._repeated(table.gpu_token_s)
        self.link_latency_s = self._repeated(table.link_latency_s)
        self.activation_token_s = self._repeated(table.activation_token_s)
        self.far_floor_s = self._repeated(table.far_floor_s)
        self.kv_token_s = self._repeated(table.kv_token_s)
        self.dense_layer_s = self._repeated(table.dense_layer_s)
        self.head_s = self._repeated(table.head_s)
        self.engine_base_s = self._repeated(table.engine_base_s)
        self.engine_token_s = self._repeated(table.engine_token_s)

    def put(self, lane: int, facts: Facts) -> None:
        """Other facts, at the same widths, for one lane."""
        for name in _OF_TABLE:
            getattr(self, name)[lane] = getattr(facts.table, name)

    def scaled(self, factors: FloatArray) -> LaneFacts:
        """Of machines whose GPU, far device and link take ``factors`` [n, 3] times as long.

        Of the first n lanes.
        """
        found, n = copy(self), len(factors)
        for name in _OF_TABLE:
            setattr(found, name, getattr(self, name)[:n])
        gpu, far, link = factors.T
        found.gpu_weight_s = found.gpu_weight_s * gpu[:, None]
        found.gpu_token_s = found.gpu_token_s * gpu
        found.layer_s = found.layer_s * gpu[:, None]
        found.kv_token_s = found.kv_token_s * gpu
        found.dense_layer_s = found.dense_layer_s * gpu
        found.head_s = found.head_s * gpu
        found.far_weight_s = found.far_weight_s * far[:, None]
        found.far_token_s = found.far_token_s * far[:, None]
        found.copy_s = found.copy_s * link[:, None]
        found.activation_token_s = found.activation_token_s * link
        return found

    def _repeated(self, value: Any) -> FloatArray:
        one = np.asarray(value, np.float64)
        return np.broadcast_to(one, (self._n_lanes, *one.shape)).copy()


_OF_TABLE = (
    "gpu_weight_s", "gpu_launch_s", "far_weight_s", "far_token_s", "copy_s", "layer_s",
    "gpu_token_s", "link_latency_s", "activation_token_s", "far_floor_s", "kv_token_s",
    "dense_layer_s", "head_s", "engine_base_s", "engine_token_s",
)  # fmt: skip
