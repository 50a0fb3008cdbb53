"""An agent is two files of anyone: what does not belong together or cannot run is refused whole."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from ndp_gym.agent_file import Agent, load_agent, save_agent
from ndp_gym.layer_agents import ACTIONS
from ndp_gym.layer_features import FEATURES
from ndp_gym.policy import resolve
from policies.agent import SHIPPED, LayerAgent


def agent_of(seed: int) -> Agent:
    rng = np.random.default_rng(seed)
    sizes = (len(FEATURES), 8, len(ACTIONS))
    layers = [
        (rng.normal(size=(n, m)).astype(np.float32), rng.normal(size=n).astype(np.float32))
        for m, n in pairwise(sizes)
    ]
    return Agent(features=FEATURES, layers=layers, base={"price": 2.0}, card={"note": "mine"})


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    card = json.loads(path.with_suffix(".json").read_text())
    edit(card)
    path.with_suffix(".json").write_text(json.dumps(card))


def with_arrays(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Other arrays, and a card that knows them."""
    arrays = load(path.read_bytes())
    edit(arrays)
    path.write_bytes(save(arrays))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edited(path, lambda card: card.update(weights_sha256=digest))


def test_a_card_beside_the_weights_of_another_agent_is_refused(tmp_path: Path) -> None:
    one, other = (save_agent(agent_of(seed), tmp_path / name) for seed, name in enumerate("ab"))
    one.write_bytes(other.read_bytes())  # what a kill between the two writes leaves
    with pytest.raises(ValueError, match=r"a\.json: .*weights_sha256 is not that of a\.safeten"):
        load_agent(one)
    assert load_agent(other).base == {"price": 2.0}


def test_a_folder_is_no_agent_but_has_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder, not an agent$"):
        load_agent(tmp_path)
    save_agent(agent_of(0), tmp_path / "best")
    for path in (str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(ValueError, match=f"is a folder, not an agent: {tmp_path}/best is one$"):
            LayerAgent(path)
    save_agent(agent_of(1), tmp_path)  # a file beside a folder of that name
    assert load_agent(tmp_path).card["note"] == "mine"


@pytest.mark.parametrize("text", [b"", b'{"kind": "ndp-gym la', b"\xd3", b"[]"])
def test_a_damaged_card_is_blamed_itself(tmp_path: Path, text: bytes) -> None:
    path = save_agent(agent_of(0), tmp_path / "best")
    path.with_suffix(".json").write_bytes(text)
    with pytest.raises(ValueError, match=r"best\.json: not an agent: (not JSON|must be a map)"):
        load_agent(path)


def test_what_an_agent_is_wins_over_the_card_it_came_from(tmp_path: Path) -> None:
    first = load_agent(save_agent(agent_of(0), tmp_path / "a"))
    changed = replace(first, base={"price": 3.0}, layers=agent_of(1).layers)
    again = load_agent(save_agent(changed, tmp_path / "b"))
    assert again.base == {"price": 3.0}
    assert again.card["note"] == "mine"
    features = np.ones((2, len(FEATURES)), np.float32)
    np.testing.assert_array_equal(again(features), agent_of(1)(features))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=3), "version 4, got 'ndp-gym layer agents' version 3"),
        (lambda c: c.pop("weights_sha256"), "it has no 'weights_sha256'"),
        (lambda c: c["features"].update(log_batch=[0, 0]), "log_batch must have a finite offset"),
        (lambda c: c["features"].update(log_batch=[0, float("nan")]), "log_batch must have a fin"),
        (lambda c: c["features"].update(log_batch=[0]), "log_batch must have an offset and a sc"),
        (lambda c: c["network"].update(sizes=[9, 4]), r"sizes must be those of the .*\[8, 4\]"),
        (lambda c: c["network"].update(sizes=[4]), r"sizes \[4\] must have float32 arrays"),
        (lambda c: c["base"].update(luck=1), "no constant"),
        (lambda c: c["base"].update(price=-1), "price must be finite and > 0, got -1"),
        (lambda c: c["base"].update(gain=2), r"gain must be in 0\.\.1, got 2"),
        (lambda c: c["base"].update(decay=float("nan")), r"decay must be in 0\.\.1, got nan"),
        (lambda c: c.update(forecast=[[1, 2], [3]]), "not an agent"),
    ],
)
def test_a_card_is_refused_with_its_file_and_fault(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = save_agent(agent_of(0), tmp_path / "a")
    edited(path, edit)
    with pytest.raises(ValueError, match=message) as found:
        load_agent(path)
    assert str(found.value).startswith(f"{tmp_path}/a.json: not an agent: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.update({"0.bias": a["0.bias"] * np.float32("nan")}), "must hold finite num"),
        (lambda a: a.update({"0.bias": a["0.bias"].astype(np.float64)}), "must have float32"),
        (lambda a: a.update({"2.bias": a["0.bias"]}), "must have float32 arrays"),
        (lambda a: a.pop("1.weight"), "must have float32 arrays"),
        (lambda a: a.update({"1.weight": a["1.weight"].T.copy()}), "layer 1 must map 8 numbers"),
    ],
)
def test_weights_are_refused_with_their_file_and_fault(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = save_agent(agent_of(0), tmp_path / "a")
    with_arrays(path, edit)
    with pytest.raises(ValueError, match=rf"a\.json: not an agent: .*{message}"):
        load_agent(path)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", "\ud800"])
def test_cards_that_are_no_maps_are_refused(tmp_path: Path, text: str) -> None:
    path = save_agent(agent_of(0), tmp_path / "a")
    path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"a\.json: not an agent: (not JSON|must be a map)"):
        load_agent(path)


@pytest.mark.parametrize("card", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_agent_loads(card: Path) -> None:
    assert load_agent(card).card["training"]


def test_an_agent_runs_without_its_network() -> None:
    whole, mute = (resolve(f"agent:path=rand_0{more}")() for more in ("", ",network=False"))
    assert isinstance(whole, LayerAgent)
    assert isinstance(mute, LayerAgent)
    features = np.ones((2, len(whole.agent.features)), np.float32)
    assert whole.agent(features).any()
    assert not mute.agent(features).any()
    np.testing.assert_array_equal(mute.agent.forecast, whole.agent.forecast)
    assert mute.agent.base == whole.agent.base
    with pytest.raises(ValueError, match="network must be True or False, got 'no'"):
        resolve("agent:path=rand_0,network=no")()
