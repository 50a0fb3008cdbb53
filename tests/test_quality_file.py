"""Files of measured errors, and how environment, evaluation and command line use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from safetensors.numpy import save_file

from ndp_gym import ENV_ID, cli
from ndp_gym.env import NDPPlacementEnv
from ndp_gym.evaluation import evaluate
from ndp_gym.explain import explain
from ndp_gym.inputs import find_quality
from ndp_gym.layer_env import LayerVecEnv
from ndp_gym.quality import QualityModel
from ndp_gym.quality_file import QualityFile
from ndp_gym.vector import NDPPlacementVectorEnv
from tests.toy import MODEL, SYSTEM
from tests.toy_evaluation import toy_trace

BITS = (8, 4, 3, 2, 1)


def toy_file(shape: tuple[int, ...] = (2, 4), bits: tuple[int, ...] = BITS) -> QualityFile:
    """Errors that differ by layer, expert and width."""
    scale = 1 + np.arange(np.prod(shape)).reshape(shape)
    return QualityFile(
        relative_error=scale[:, :, None] * 0.25 ** np.array(bits, float),
        stored_bits=np.array(bits, float) + 0.25,
        bits=bits,
        method="clip_search",
        group=128,
        model="toy",
        layers=tuple(range(shape[0])),
        sources=({"file": "toy.safetensors", "bytes": 7, "header_sha256": "ab"},),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    toy_file().save(tmp_path / "q.safetensors")
    return tmp_path / "q.safetensors"


def test_a_saved_file_opens_as_it_was(path: Path) -> None:
    saved, opened = toy_file(), QualityFile.open(path)
    assert np.array_equal(opened.relative_error, saved.relative_error)
    assert np.array_equal(opened.stored_bits, saved.stored_bits)
    for name in ("bits", "method", "group", "model", "layers", "sources"):
        assert getattr(opened, name) == getattr(saved, name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_errors_stand_in_the_order_of_the_stored_widths(path: Path) -> None:
    assert SYSTEM.stored_bits == (16, 8, 4, 2)
    table = find_quality(path, MODEL, SYSTEM).table
    assert table is not None
    assert table[1, 2].tolist() == [0.0, 7 * 0.25**8, 7 * 0.25**4, 7 * 0.25**2]
    assert find_quality(None, MODEL, SYSTEM) == QualityModel()
    given = QualityModel(2.0)
    assert find_quality(given, MODEL, SYSTEM) is given


def rewritten(path: Path, **metadata: Any) -> None:
    """The file with other metadata fields; ``None`` removes one."""
    good = {
        "kind": "quality", "schema": 1, "method": "m", "group": 8, "bits": list(BITS),
        "model": "toy", "layers": [0, 1], "sources": [],
    }  # fmt: skip
    facts = {k: v for k, v in {**good, **metadata}.items() if v is not None}
    tensors = {"relative_error": np.ones((2, 4, 5)), "stored_bits": np.ones(5)}
    save_file(tensors, path, {"ndp_gym": json.dumps(facts)})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "trace"}, "not a file of ndp-gym quality measure"),
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"group": None}, "metadata must have 'group'"),
        ({"bits": [8, 4, 3, 2]}, r"relative_error must have shape \[L, E, 4\] for bits"),
        ({"bits": [1, 2, 3, 4, 8]}, "bits must be distinct and descending"),
        ({"bits": 4}, "not iterable"),
        ({"layers": [0]}, "layers must name 2 layers, got 1"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = tmp_path / "q.safetensors"
    rewritten(path, **metadata)
    with pytest.raises(ValueError, match=f"q.safetensors: .*{message}"):
        QualityFile.open(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not safetensors at all")
    with pytest.raises(ValueError, match="text: not a safetensors file"):
        QualityFile.open(text)
    toy_trace([3]).save(tmp_path / "trace.safetensors")
    with pytest.raises(ValueError, match="not a file of ndp-gym quality measure"):
        QualityFile.open(tmp_path / "trace.safetensors")
    with pytest.raises(FileNotFoundError):
        QualityFile.open(tmp_path / "absent")
    with pytest.raises(ValueError, match="relative_error must be finite and >= 0"):
        replace(toy_file(), relative_error=np.full((2, 4, 5), np.nan))


def test_a_file_of_another_model_or_without_a_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    toy_file((3, 4)).save(path)
    with pytest.raises(
        ValueError, match=r"q.safetensors: .*3 layers x 4 experts, model 'toy' has 2 x 4"
    ):
        find_quality(path, MODEL, SYSTEM)
    toy_file(bits=(8, 3)).save(path)
    with pytest.raises(ValueError, match="lack 4, 2 bit, which system 'toy' stores: they have 8"):
        find_quality(path, MODEL, SYSTEM)


def steps(env: Any) -> list[tuple[float, float]]:
    """Reward and loss of three windows under fixed random actions."""
    env.reset(seed=3)
    env.action_space.seed(4)
    found = []
    for _ in range(3):
        _, reward, _, truncated, info = env.step(env.action_space.sample())
        found.append((reward, info["delta_nll_nats"]))
        if np.any(truncated):
            break
    return found


def toy_arguments(**kwargs: Any) -> dict[str, Any]:
    return {"trace": toy_trace([9] * 8), "model": MODEL, "system": SYSTEM, "batch_size": 2,
            "window": 4, "split": "test", "hbm_budget": 0.3, **kwargs}  # fmt: skip


def test_the_environment_loses_what_was_measured(path: Path) -> None:
    default = steps(NDPPlacementEnv(**toy_arguments()))
    by_path = steps(NDPPlacementEnv(**toy_arguments(quality=str(path))))
    by_model = steps(NDPPlacementEnv(**toy_arguments(quality=find_quality(path, MODEL, SYSTEM))))
    assert by_path == by_model
    assert all(ours != theirs for ours, theirs in zip(by_path, default, strict=True))


def test_every_environment_takes_the_file(path: Path) -> None:
    single = steps(NDPPlacementEnv(**toy_arguments(quality=path)))[0]
    envs: Any = NDPPlacementVectorEnv(1, **toy_arguments(quality=path))
    vector = steps(envs)[0]
    assert (float(vector[0][0]), float(vector[1][0])) == pytest.approx(single)
    layers = LayerVecEnv(1, **toy_arguments(quality=path))
    assert np.array_equal(
        layers.lanes.simulator.quality.table, find_quality(path, MODEL, SYSTEM).table
    )


def test_the_spec_with_a_path_is_json(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    toy_file((8, 64)).save(path)
    env = gym.make(ENV_ID, quality=str(path), max_windows=3)
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert steps(env) == steps(again)
    assert steps(env) != steps(gym.make(ENV_ID, max_windows=3))


def test_evaluation_uses_and_records_the_file(path: Path) -> None:
    trace, table = toy_trace([9] * 4), find_quality(path, MODEL, SYSTEM)
    by_path = evaluate([], trace, MODEL, SYSTEM, quality=path)
    by_model = evaluate([], trace, MODEL, SYSTEM, quality=table)
    losses = [row["delta_nll_nats"] for row in by_path.rows]
    assert losses == [row["delta_nll_nats"] for row in by_model.rows]
    # all_far4: 4-bit error of experts 0, 1 (gates .75, .25), then of 2, 3 of layer 1 of two equal
    shares = np.array([0.75, 0.25]) ** 2 / (0.75**2 + 0.25**2)
    expected = 3.0 * 0.25**4 * (shares @ [1, 2] + shares @ [7, 8]) / 2
    assert losses[0] == pytest.approx(expected)
    facts = by_path.provenance["quality"]
    assert (facts["file"], facts["table_shape"], facts["kappa"]) == (str(path), [2, 4, 5], 3.0)
    assert json.loads(by_path.rows[0]["env_spec"])["kwargs"]["quality"] == str(path)
    assert "quality" not in json.loads(by_model.rows[0]["env_spec"])["kwargs"]


def test_explain_uses_the_file(path: Path) -> None:
    run = ("all_far4", "all_hbm", toy_trace([9] * 4), MODEL, SYSTEM)
    measured, plain = explain(*run, hbm_budget=0.9, quality=path), explain(*run, hbm_budget=0.9)
    assert measured.a.delta_nll_nats != plain.a.delta_nll_nats
    assert measured.terms == plain.terms


def test_commands_take_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "q.safetensors", tmp_path / "e.json"
    toy_file((8, 64)).save(path)
    short = ["--max-windows", "2", "--quality", str(path)]
    assert cli.main(["evaluate", "--policies", "all_far4", *short, "--json", str(out)]) == 0
    provenance = json.loads(out.read_text())["provenance"]
    assert provenance["quality"]["table_shape"] == [8, 64, 5]
    assert cli.main(["explain", "all_far4", "all_far4", *short]) == 0
    capsys.readouterr()
    toy_file((2, 4)).save(path)
    assert cli.main(["evaluate", "--policies", "all_far4", *short]) == 2
    error = capsys.readouterr().err
    assert "2 layers x 4 experts, model 'minimoe-16b' has 8 x 64" in error
    assert cli.main(["evaluate", "--quality", str(tmp_path / "absent")]) == 2
    assert "absent: No such file" in capsys.readouterr().err
