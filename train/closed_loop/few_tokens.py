"""The experts of one layer for the few tokens of a decode step, compiled.

A loop of matrix products over 64 experts (`traces.minimoe.experts`) pays for whole texts; a decode
step of eight tokens would spend most of its time calling them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from traces.minimoe.experts import Experts


def mix(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """What ``experts(x, weights, ids)`` returns: x [T, H], weights and ids [T, K] -> [T, H]."""
    w_in, w_out = experts.w_in.detach().numpy(), experts.w_out.detach().numpy()
    result = np.zeros(tuple(x.shape), np.float32)
    _mix(x.numpy(), weights.numpy(), ids.numpy(), w_in, w_out, result)
    return torch.from_numpy(result)


@njit(cache=True)
def _mix(x, weights, ids, w_in, w_out, result):  # type: ignore[no-untyped-def]
    size = w_out.shape[1]
    hidden = np.empty(2 * size, np.float32)
    for token in range(x.shape[0]):
        for rank in range(ids.shape[1]):
            expert, gate = ids[token, rank], weights[token, rank]
            hidden[:] = 0.0
            for i in range(x.shape[1]):
                value, row = x[token, i], w_in[expert, i]
                for j in range(hidden.size):
                    hidden[j] += value * row[j]
            for i in range(size):
                a = hidden[i]
                value = gate * hidden[size + i] * a / np.float32(1.0 + math.exp(-a))
                row = w_out[expert, i]
                for j in range(result.shape[1]):
                    result[token, j] += value * row[j]
