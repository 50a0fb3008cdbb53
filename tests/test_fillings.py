"""Fillings of a layer, and what is chosen among them, against plain loops over experts."""

from dataclasses import replace
from math import exp, pi, sqrt

import numpy as np
import pytest

from ndp_gym import presets
from ndp_gym.allocation import FAR_SHARES, Target, far_widths, stage, within_budget
from ndp_gym.cost import cost_table
from ndp_gym.fillings import Prices, Window, far_seconds, fillings
from ndp_gym.forecast import expected, shares
from tests.test_policies import MODEL, SYSTEM, random_load

SLOW_LAUNCH = replace(
    SYSTEM,
    overlap=0.7,
    gpu=replace(
        SYSTEM.gpu,
        moe_kernels={k: v._replace(launch_s=1e-5) for k, v in SYSTEM.gpu.moe_kernels.items()},
    ),
)
SYSTEMS = [SYSTEM, SLOW_LAUNCH, presets.system("h100_fetch")]


def window_of(seed, system=SYSTEM, model=MODEL, n_tokens=4.0, moves=False):
    """A window, quality that is lost and copies that are present, all random."""
    rng = np.random.default_rng(seed)
    table = cost_table(model, system)
    routing = expected(shares(random_load(seed)), n_tokens, 2000.0, model.top_k)
    lost = np.sort(rng.exponential(1e-4, (*routing.load.shape, len(table.bits))), axis=-1)
    lost = np.ascontiguousarray(lost.swapaxes(1, 2))
    present = rng.choice([0, 0, *table.bits], routing.load.shape)
    far_computes = system.default_service.kind == "in_place"
    far_s = far_seconds(table, far_computes, routing)
    return Window(table, far_computes, routing, far_s, lost, present, moves and far_computes)


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


# Twins


def least(values):
    """Index of the least value, the first of equals."""
    return min(range(len(values)), key=lambda i: (values[i], i))


class LayerTwin:
    """What a layer costs, expert by expert; prices are numbers."""

    def __init__(self, window, prices, layer):
        self.window, self.prices, self.table = window, prices, window.table
        self.load, self.active = window.expected.load[layer], window.expected.active[layer]
        self.lost, self.present = window.lost[layer].T, window.present[layer]
        self.far_s = prices.far_factor * window.far_s[layer].T
        self.overlap = window.table.overlap if window.far_computes else 0.0
        self.experts, self.widths = range(len(self.load)), range(len(self.table.bits))

    def gpu_s(self, e, b):
        return self.prices.gpu_factor * self.active[e] * self.table.gpu_weight_s[b]

    def copy_loss(self, e, b):
        arrives = self.present[e] != self.table.bits[b]
        return self.prices.copy_second * self.table.copy_s[b] * arrives

    def n_bytes(self, e, b):
        sizes = dict(zip(self.table.bits, self.table.weight_bytes, strict=True))
        return max(self.table.weight_bytes[b], sizes.get(self.present[e], 0))

    def far_width(self, e, share):
        price = self.prices.second * (self.overlap * share + 1 - self.overlap)
        return least([price * self.far_s[e, b] + self.lost[e, b] for b in self.widths])

    def hbm_cost(self, e, b):
        price = self.prices.second * (1 - self.overlap * max(self.prices.far_share, 0.5))
        return price * self.gpu_s(e, b) + self.lost[e, b] + self.copy_loss(e, b)

    def hbm_width(self, e, c):
        """In the c-th ranking: that width, the best per expert, or that of the copy present."""
        if c < len(self.widths):
            return c
        if c > len(self.widths) and self.present[e] > 0:
            return list(self.table.bits).index(self.present[e])
        byte = self.prices.byte
        return least([self.hbm_cost(e, b) + byte * self.n_bytes(e, b) for b in self.widths])

    def gain(self, e, b):
        share = max(self.prices.far_share, 0.5)
        price = self.prices.second * (self.overlap * share + 1 - self.overlap)
        far = self.far_width(e, self.prices.far_share)
        return price * self.far_s[e, far] + self.lost[e, far] - self.hbm_cost(e, b)

    def variance(self, e, seconds):
        return seconds**2 * (1 - self.active[e]) / self.active[e]

    def gpu_side_s(self, hot):
        """``hot`` is {expert: width}."""
        compute_s = self.table.gpu_token_s * sum(self.load[e] for e in hot)
        launch_s = 0.0
        for b in self.widths:
            busy = sum(self.active[e] for e, width in hot.items() if width == b)
            launch_s += self.table.gpu_launch_s[b] * (1 - exp(-busy))
        weights_s = sum(self.gpu_s(e, b) for e, b in hot.items())
        return launch_s + max(weights_s, self.prices.gpu_factor * compute_s)

    def seconds(self, hot, far):
        """``hot`` and ``far`` are {expert: width}."""
        table, routing = self.table, self.window.expected
        gpu_s, far_s = self.gpu_side_s(hot), sum(self.far_s[e, b] for e, b in far.items())
        if not self.window.far_computes:
            return gpu_s + far_s
        spread = sum(self.variance(e, self.gpu_s(e, b)) for e, b in hot.items())
        spread += sum(self.variance(e, self.far_s[e, b]) for e, b in far.items())
        share = sum(self.load[e] for e in hot) / (routing.n_tokens * routing.top_k)
        stays = min(share, 1.0) ** routing.top_k
        any_far = 1 - stays**routing.n_tokens
        far_s += any_far * 2 * table.link_latency_s
        far_s += routing.n_tokens * (1 - stays) * table.activation_token_s
        far_s = max(far_s, any_far * table.far_floor_s)
        longer = (gpu_s + far_s + sqrt((gpu_s - far_s) ** 2 + 2 / pi * spread)) / 2
        if self.window.moves:
            left_s, more_s = self.after_moves(hot, far, longer - gpu_s, far_s)
            return table.overlap * (gpu_s + more_s) + (1 - table.overlap) * (
                gpu_s + more_s + left_s
            )
        return table.overlap * longer + (1 - table.overlap) * (gpu_s + far_s)

    def after_moves(self, hot, far, ahead_s, far_s):
        """Seconds that stay with the far device, and those by which the GPU side gets longer."""
        table = self.table
        n_far = sum(self.active[e] for e in far)
        moved_s = sum(self.active[e] * table.copy_s[b] + self.gpu_s(e, b) for e, b in far.items())
        if not far:
            return far_s, 0.0
        each_far_s, each_moved_s = far_s / n_far, moved_s / n_far
        k = ahead_s / (each_far_s + each_moved_s)  # experts that would leave both sides even
        half = each_moved_s / (each_far_s + each_moved_s) / 2
        lost = min(k, half)  # of rounding to whole experts
        moved = k - lost * max(1 - each_far_s / each_moved_s, 0)
        launches_s = 0.0
        for e, b in far.items():
            idle = exp(-sum(self.active[h] for h, width in hot.items() if width == b))
            launches_s += self.active[e] / n_far * idle * table.gpu_launch_s[b]
        more_s = k * each_moved_s + lost * each_far_s + min(moved, 1) * launches_s
        return far_s - moved * each_far_s, more_s


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("seed", "n_tokens"), [(0, 4.0), (1, 2.6), (2, 1.0)])
def test_every_filling_costs_what_its_experts_cost_one_by_one(system, seed, n_tokens, moves):
    window = window_of(seed, system, n_tokens=n_tokens, moves=moves)
    prices = prices_of(byte=10.0 ** (-9 - seed))
    found = fillings(window, prices)
    for layer in range(MODEL.n_layers):
        twin = LayerTwin(window, prices, layer)
        for c in range(len(twin.widths) + 2):
            width = [twin.hbm_width(e, c) for e in twin.experts]
            size = [twin.n_bytes(e, b) for e, b in enumerate(width)]
            gain = [twin.gain(e, b) for e, b in enumerate(width)]
            kept = [c > len(twin.widths) and twin.present[e] > 0 for e in twin.experts]
            value = [g - prices.byte * n for g, n in zip(gain, size, strict=True)]
            ranking = sorted(twin.experts, key=lambda e: (not kept[e], -value[e], e))
            assert found.items.hbm_index[c, layer].tolist() == width
            assert found.items.n_bytes[c, layer].tolist() == size
            assert found.items.gain[c, layer] == pytest.approx(gain, rel=1e-9, abs=1e-12)
            assert found.items.ranking[c, layer].tolist() == ranking
            for k in range(len(ranking) + 1):
                hot = {e: width[e] for e in ranking[:k]}
                far = {e: twin.far_width(e, prices.far_share) for e in ranking[k:]}
                loss = sum(twin.lost[e, b] for e, b in (*hot.items(), *far.items()))
                loss += sum(twin.copy_loss(e, b) for e, b in hot.items())
                seconds = twin.seconds(hot, far)
                assert found.n_bytes[layer, c, k] == sum(size[e] for e in hot)
                assert found.gpu_s[layer, c, k] == pytest.approx(twin.gpu_side_s(hot), rel=1e-9)
                assert found.seconds[layer, c, k] == pytest.approx(seconds, rel=1e-9)
                objective = prices.second * seconds + loss
                assert found.objective[layer, c, k] == pytest.approx(objective, rel=1e-9)


def test_many_experts_are_ranked_by_gain_less_the_price_of_bytes_and_ties_by_number():
    n_experts = 150
    model = replace(MODEL, n_experts=n_experts)
    table, rng = cost_table(model, SYSTEM), np.random.default_rng(0)
    routing = expected(shares(rng.integers(1, 40, (3, n_experts)).astype(float)), 4.0, 0.0, 2)
    far_s = far_seconds(table, True, routing)
    lost, present = np.zeros(far_s.shape), np.zeros(routing.load.shape, np.int64)
    items = fillings(Window(table, True, routing, far_s, lost, present), prices_of()).items
    key = prices_of().byte * items.n_bytes - items.gain
    assert len(np.unique(key[0, 0])) < n_experts
    assert np.array_equal(items.ranking, np.argsort(key, axis=-1, kind="stable"))


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("seed", range(3))
def test_far_widths_are_those_of_the_share_under_which_the_layer_is_best(system, seed, moves):
    window, prices = window_of(seed, system, moves=moves), prices_of(second=500.0)
    found = fillings(window, prices)
    n_rankings, n_counts = found.objective.shape[1:]
    rng = np.random.default_rng(seed)
    chosen = rng.integers(n_rankings * n_counts, size=MODEL.n_layers)
    share, widths = far_widths(found, chosen)
    for layer in range(MODEL.n_layers):
        twin = LayerTwin(window, prices, layer)
        c, count = divmod(int(chosen[layer]), n_counts)
        hot = {e: twin.hbm_width(e, c) for e in found.items.ranking[c, layer, :count].tolist()}
        twin.overlap = 1.0  # shares are of the whole time here
        tried = FAR_SHARES if window.far_computes else FAR_SHARES[:1]
        bought = [[twin.far_width(e, s) for e in twin.experts] for s in tried]
        values = []
        for width in bought:
            far = {e: b for e, b in enumerate(width) if e not in hot}
            loss = sum(twin.lost[e, b] for e, b in far.items())
            values.append(prices.second * twin.seconds(hot, far) + loss)
        at = tried.index(share[layer])
        assert widths[layer].tolist() == bought[at]
        assert values[at] == pytest.approx(min(values), rel=1e-9)


def test_the_choice_within_a_budget_is_that_of_plain_bisection():
    rng = np.random.default_rng(0)
    for case in range(60):
        options = fillings(window_of(case), prices_of(second=10.0 ** rng.uniform(0, 3)))
        n_bytes = options.n_bytes.reshape(MODEL.n_layers, -1)
        objective = options.objective.reshape(MODEL.n_layers, -1)
        free = n_bytes[np.arange(MODEL.n_layers), objective.argmin(axis=1)].sum()
        budget = float(free * rng.uniform(0.0, 1.2))
        chosen, price = within_budget(options, budget)
        wanted, wanted_price = bisected(objective, n_bytes, budget)
        assert chosen.tolist() == wanted
        assert price == pytest.approx(wanted_price, rel=1e-12)
        assert sum(n_bytes[layer, way] for layer, way in enumerate(wanted)) <= budget


def bisected(objective, n_bytes, budget):
    """Columns per layer and the price, searching all of them at each of 20 prices."""
    layers = range(len(objective))

    def best(price):
        return [int((objective[i] + price * n_bytes[i]).argmin()) for i in layers]

    def used(chosen):
        return sum(n_bytes[i, way] for i, way in enumerate(chosen))

    if used(best(0.0)) <= budget:
        return best(0.0), 0.0
    high = 2 * (objective.max() - objective.min()) / n_bytes[n_bytes > 0].min()
    low = high * 1e-6
    for _ in range(20):
        middle = sqrt(low * high)
        low, high = (low, middle) if used(best(middle)) <= budget else (middle, high)
    chosen = best(high)
    for _ in range(32):
        gains, ways = [], []
        for i in layers:
            fits = n_bytes[i] <= n_bytes[i, chosen[i]] + budget - used(chosen)
            ways.append(int(np.where(fits, objective[i], np.inf).argmin()))
            gains.append(objective[i, chosen[i]] - objective[i, ways[-1]])
        taker = int(np.argmax(gains))
        if gains[taker] <= 0:
            break
        chosen[taker] = ways[taker]
    return chosen, high


@pytest.mark.parametrize("seed", range(12))
def test_staging_serves_promotions_first_by_value_then_copies_worth_keeping(seed):
    rng = np.random.default_rng(seed)
    table = cost_table(MODEL, SYSTEM)
    size = dict(zip(table.bits.tolist(), table.weight_bytes.tolist(), strict=True)) | {0: 0}
    bits, present = (rng.choice([0, 0, *table.bits], (3, 16)) for _ in range(2))
    value = rng.integers(0, 9, bits.shape) / 8.0  # with ties
    target = Target(bits, value, rng.integers(-2, 9, bits.shape) / 8.0)
    most = sum(max(size[b], size[p]) for b, p in zip(bits.flat, present.flat, strict=True))
    budget, can_arrive = rng.uniform(0.8, 1.2) * most, rng.uniform(0, 0.5) * most
    staged = stage(table, target, present, budget, can_arrive)

    def first(among, values, sizes, room):
        taken = []
        for i in sorted(among, key=lambda i: (-values.flat[i], i)):
            room -= size[sizes.flat[i]]
            if room < 0:
                break
            taken.append(i)
        return taken

    moving = [i for i in range(bits.size) if 0 < bits.flat[i] != present.flat[i]]
    goes = first(moving, value, bits, max(can_arrive, max(size.values())))
    wanted, worth, charged = bits.copy(), value.copy(), 0
    for i in range(bits.size):
        if i in moving and i not in goes:
            wanted.flat[i] = present.flat[i]
            worth.flat[i] = (target.present_value if present.flat[i] else value).flat[i]
        if wanted.flat[i]:
            charged += max(size[wanted.flat[i]], size[present.flat[i]])
    worth_keeping = (present > 0) & (wanted == 0) & (target.present_value > 0)
    for i in first(np.flatnonzero(worth_keeping), target.present_value, present, budget - charged):
        wanted.flat[i], worth.flat[i] = present.flat[i], target.present_value.flat[i]
    assert np.array_equal(staged.bits, wanted)
    assert np.array_equal(staged.value, worth)
