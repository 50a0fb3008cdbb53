"""Fillings of a layer: prices per layer."""

import numpy as np
import pytest

from ndp_gym import presets
from ndp_gym.cost import cost_table
from ndp_gym.fillings import Prices, Window, fillings
from ndp_gym.forecast import expected, shares
from tests.test_policies import MODEL, SYSTEM, random_load


def window_of(seed, system=SYSTEM, model=MODEL):
    """A window of four tokens, quality that is lost and copies that are present, all random."""
    rng = np.random.default_rng(seed)
    table = cost_table(model, system)
    routing = expected(shares(random_load(seed)), 4.0, 2000.0, model.top_k)
    lost = np.sort(rng.exponential(1e-4, (*routing.load.shape, len(table.bits))), axis=-1)
    present = rng.choice([0, 0, *table.bits], routing.load.shape)
    in_place = system.default_service.kind == "in_place"
    return Window(table, in_place, routing, lost, present)


def prices_of(**changes):
    given = {"second": 50.0, "byte": 1e-12, "copy_second": 0.2, "far_share": 0.7}
    return Prices(**{**given, "gpu_factor": 1.1, "far_factor": 0.9, **changes})


@pytest.mark.parametrize("system", [SYSTEM, presets.system("h100_fetch")])
def test_prices_of_one_layer_move_that_layer_alone(system):
    window = window_of(0, system)
    plain = fillings(window, prices_of())
    for name in ("second", "copy_second", "far_share", "gpu_factor", "far_factor"):
        number = getattr(prices_of(), name)
        one = np.full(MODEL.n_layers, number)
        one[1] = 0.5 * number
        there = fillings(window, prices_of(**{name: one})).objective
        everywhere = fillings(window, prices_of(**{name: 0.5 * number})).objective
        assert np.array_equal(there[0], plain.objective[0])
        assert np.array_equal(there[1], everywhere[1])
        assert np.array_equal(there[2], plain.objective[2])
        if system is SYSTEM or name != "far_share":
            assert not np.array_equal(there[1], plain.objective[1])


def test_prices_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match=r"far_factor must be one number or \[3\], not \(2,\)"):
        fillings(window_of(0), prices_of(far_factor=np.ones(2)))
