"""Forecasts fitted on a train split: directions of its loads, and weights that help on val."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.agent_file import Agent, load_agent, save_agent
from ndp_gym.forecast import shares
from ndp_gym.inputs import find_model, find_system, open_trace
from ndp_gym.lanes import Lanes
from ndp_gym.layer_agents import ACTIONS
from ndp_gym.layer_features import FEATURES
from ndp_gym.layer_forecast import Learned, Routing, learned_of
from ndp_gym.patterns import CHUNK, HALF_AT, RANK, patterns_of, train_patterns
from ndp_gym.policy import Patterns
from ndp_gym.rollout import train_profile
from ndp_gym.trace import RoutingTrace
from tests.conftest import make_trace
from tests.toy import MODEL as TOY
from train.forecast import LIVE, fit_weights, folds, samples

SHAPE = (3, 10)
MODEL = find_model(None, open_trace())


def routing_of(seed: int) -> Routing:
    rng = np.random.default_rng(seed)
    parts = {name: shares(rng.random((2, *SHAPE))) for name in Routing._fields}
    return Routing(**parts)


def directions(seed: int = 0, rank: int = 4) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(30, rank)))[0]
    return np.ascontiguousarray(basis.T).reshape(rank, *SHAPE)


def patterns() -> Patterns:
    return Patterns(directions(), np.random.default_rng(5).uniform(0.5, 2, SHAPE))


def test_directions_are_orthogonal_shrinking_and_of_the_train_split_alone() -> None:
    trace = open_trace()
    found = train_patterns(trace, MODEL).directions
    flat = found.reshape(RANK, -1)
    squares = (flat**2).sum(axis=1)
    np.testing.assert_allclose(flat @ flat.T, np.diag(squares), atol=1e-9)
    assert (np.diff(squares) < 0).all()
    assert squares[HALF_AT] == pytest.approx(0.5)
    assert squares[0] < 1
    again = patterns_of(trace, MODEL, trace.split_requests("train")).directions
    np.testing.assert_array_equal(found, again)
    other = patterns_of(trace, MODEL, trace.split_requests("test")).directions
    assert not np.allclose(np.abs(other), np.abs(found))


def test_the_first_directions_hold_most_of_what_differs_between_texts() -> None:
    trace, prior = open_trace(), train_profile(open_trace())
    flat = train_patterns(trace, MODEL).directions.reshape(RANK, -1)
    flat = flat / np.sqrt((flat**2).sum(axis=1, keepdims=True))
    rng = np.random.default_rng(0)
    chance = np.linalg.qr(rng.normal(size=(flat.shape[1], RANK)))[0].T
    held, held_by_chance = [], []
    for request in trace.split_requests("val"):
        start, length = trace.requests.start[request], trace.requests.length[request]
        ids, _ = trace.window(int(start), int(length))
        counts = np.stack(
            [np.bincount(ids[:, i].ravel(), minlength=64) for i in range(ids.shape[1])]
        )
        change = (shares(counts.astype(float)) - shares(prior)).ravel()
        for basis, into in ((flat, held), (chance, held_by_chance)):
            into.append(((basis @ change) ** 2).sum() / (change**2).sum())
    assert np.mean(held) > 0.4
    assert np.mean(held_by_chance) < 0.1


def test_without_a_train_split_there_is_no_learned_forecast() -> None:
    trace = make_trace(n_conversations=4)
    assert train_patterns(trace, MODEL) is None
    assert learned_of(np.zeros((5, 6)), None) is None
    assert learned_of(None, patterns()) is None


def test_the_weight_of_slow_memory_alone_gives_the_blend_back() -> None:
    weights = np.zeros((5, 6))
    weights[:, 0] = 1.0
    routing = routing_of(1)
    found = Learned(patterns(), weights).shares(routing, np.array([1.0, 5.0]))
    blend = np.maximum(routing.base, 0.1 * routing.prior)
    np.testing.assert_allclose(found, blend / blend.sum(axis=-1, keepdims=True))


def test_projections_keep_what_lies_in_the_directions() -> None:
    basis, routing = directions(), routing_of(2)
    weights = np.zeros((5, 6))
    weights[2, 2] = 1.0  # the projection of slow memory, at 4 live requests
    found = Learned(patterns(), weights).shares(routing, np.array([4.0, 1.0]))
    change = (routing.base - routing.prior)[0].ravel()
    inside = sum((basis[i].ravel() @ change) * basis[i] for i in range(len(basis)))
    wanted = np.maximum(routing.prior[0] + inside, 0.1 * routing.prior[0])
    np.testing.assert_allclose(found[0], wanted / wanted.sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(found[1], routing.prior[1])  # weights at 1 live request are 0


def test_fitted_weights_foresee_val_better_than_the_blend() -> None:
    trace = open_trace()
    weights, found = fit_weights((None,), 16), train_patterns(trace, MODEL)
    assert weights.shape == (len(LIVE), 6)
    rng = np.random.default_rng(1)
    lanes = Lanes(trace, find_model(None, trace), find_system(None), batch_size=2, window=16)
    missed = dict.fromkeys(("learned", "blend", "energy", "averaged energy"), 0.0)
    for sample in samples(lanes, found, trace.split_requests("val"), train_profile(trace), rng):
        features, change = sample.features, sample.change
        missed["learned"] += ((features @ weights[1, :5] - change) ** 2).sum()
        missed["blend"] += ((0.88 * features[:, 0] - change) ** 2).sum()
        drawn = sample.intensity * (features @ weights[1, :5])
        energy = weights[1, 5] * sample.gates + (1 - weights[1, 5]) * drawn
        missed["energy"] += ((energy - sample.energy) ** 2).sum()
        missed["averaged energy"] += ((sample.gates - sample.energy) ** 2).sum()
    assert missed["learned"] < 0.97 * missed["blend"]
    assert missed["energy"] < 0.9 * missed["averaged energy"]


def test_gate_energy_is_what_was_drawn_and_what_experts_draw_per_load() -> None:
    weights, routing, told = np.zeros((5, 6)), routing_of(3), patterns()
    weights[:, 5] = 0.25
    found = Learned(told, weights).energy(routing.base, routing.gates, np.array([1.0, 3.0]))
    drawn = routing.base * told.intensity
    drawn = drawn / drawn.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, 0.25 * routing.gates + 0.75 * drawn)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_intensity_of_experts_is_their_energy_over_their_load(recorded: bool) -> None:
    trace, model = open_trace(), MODEL
    gates = trace.gate_weights.astype(float)
    if not recorded:  # then it is replayed with the model's mean weight by rank
        trace = RoutingTrace.from_arrays(trace.expert_ids, trace.requests, trace.metadata)
        model = replace(MODEL, gate_profile=(6.0, 4.0, 3.0, 1.5, 1.0, 0.5))
        gates = np.broadcast_to(np.array(model.gate_profile) / 16, gates.shape)
    request = trace.split_requests("train")[:12]
    total, energy = np.zeros((2, trace.n_layers, trace.n_experts))
    for r in request:
        start, end = int(trace.requests.start[r]), int(trace.requests.end[r])
        n_rows = end - start
        n_rows -= n_rows % CHUNK if n_rows % CHUNK <= CHUNK // 2 else 0  # a short rest is left out
        for row in range(start, start + n_rows):
            for layer in range(trace.n_layers):
                ids = trace.expert_ids[row, layer]
                total[layer, ids] += 1
                energy[layer, ids] += gates[row, layer] ** 2
    wanted = ((shares(energy) + 1e-4) / (shares(total) + 1e-4)) ** 0.7
    np.testing.assert_allclose(patterns_of(trace, model, request).intensity, wanted)


def test_equal_seeds_give_equal_samples() -> None:
    trace = open_trace()
    found, requests = train_patterns(trace, MODEL), trace.split_requests("train")

    def first(seed: int) -> list[np.ndarray]:
        lanes = Lanes(trace, find_model(None, trace), find_system(None), batch_size=4, window=16)
        rng = np.random.default_rng(seed)
        some = islice(samples(lanes, found, requests, train_profile(trace), rng), 5)
        return [np.column_stack(sample) for sample in some]

    np.testing.assert_array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))


def test_too_few_requests_to_fit_on_are_no_error(tmp_path: Path) -> None:
    make_trace(n_conversations=20).save(tmp_path / "t.safetensors")
    assert fit_weights((str(tmp_path / "t.safetensors"),), 4, model=TOY) is None


def test_a_conversation_is_in_one_fold_with_all_its_turns() -> None:
    requests = make_trace(n_conversations=40).requests
    train = np.flatnonzero(requests.split == 0)
    assert len(np.unique(requests.conversation[train])) < len(train)  # some have two turns
    dealt = list(folds(requests))
    assert len(dealt) == 5
    assert sorted(np.concatenate([mine for mine, _ in dealt])) == train.tolist()
    for mine, other in dealt:
        assert not set(requests.conversation[mine]) & set(requests.conversation[other])
        assert sorted([*mine, *other]) == train.tolist()


def test_requests_of_their_own_conversations_are_dealt_in_turn() -> None:
    requests = make_trace(n_conversations=40).requests
    numbers = np.random.default_rng(0).permutation(len(requests))
    train = np.flatnonzero(requests.split == 0)
    for fold, (mine, _) in enumerate(folds(replace(requests, conversation=numbers))):
        np.testing.assert_array_equal(mine, train[fold::5])


def test_weights_are_fitted_on_the_system_that_is_named() -> None:
    with pytest.raises(ValueError, match="no_such_machine"):
        fit_weights((None,), 16, system="no_such_machine")


def test_an_agents_file_keeps_the_forecast(tmp_path: Path) -> None:
    weight, bias = np.zeros((len(ACTIONS), len(FEATURES)), np.float32), np.zeros(4, np.float32)
    forecast = np.arange(30.0).reshape(5, 6) / 7
    agent = Agent(features=FEATURES, layers=[(weight, bias)], forecast=forecast, card={})
    save_agent(agent, tmp_path / "a")
    np.testing.assert_array_equal(load_agent(tmp_path / "a").forecast, forecast)
    with pytest.raises(ValueError, match="forecast must be 5 x 6"):
        Agent(features=FEATURES, layers=[(weight, bias)], forecast=np.zeros((2, 6)), card={})
