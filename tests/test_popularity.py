"""Popularity from aggregates: what each engine counts becomes [L, E], and nothing else does."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndp_gym import evaluate
from ndp_gym.cli import main
from ndp_gym.explain import explain
from ndp_gym.importers.popularity import Profile, load_profile
from ndp_gym.plan import Plan, all_far
from ndp_gym.policy import PolicyContext
from ndp_gym.specs import MoESpec
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_counts import train_profile
from tests.conftest import make_trace
from tests.test_engine_importers import torch_bytes
from tests.test_importers import npy_bytes
from tests.toy import MODEL, SYSTEM

COUNTS = np.array([[6, 1, 1, 0], [0, 3, 3, 2]])
SHARES = COUNTS / COUNTS.sum(axis=1, keepdims=True) * MODEL.top_k


def gguf_bytes(tensors: dict[str, np.ndarray], facts: tuple[tuple[str, str], ...] = ()) -> bytes:
    """GGUF 3 of float32 tensors (fastest axis last, as NumPy has it) and facts that are texts."""
    texts = (("general.type", "imatrix"), *facts)

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(texts) + 2)
    head += b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in texts)
    head += text("imatrix.chunk_count") + struct.pack("<II", 4, 7)
    head += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 2) + text("a.txt") + text("b.txt")
    data = b""
    for name, array in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        head += struct.pack("<IQ", 0, len(data))
        data += array.astype("<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def imatrix_bytes(counts: np.ndarray = COUNTS, first: int = 0) -> bytes:
    """What llama.cpp's imatrix writes of routed layers ``first`` and on, among other tensors."""
    tensors: dict[str, np.ndarray] = {}
    for layer, row in enumerate(counts, start=first):
        for kind in ("down", "gate", "up"):
            name = f"blk.{layer}.ffn_{kind}_exps.weight"
            tensors[f"{name}.in_sum2"] = np.ones((len(row), 8))
            tensors[f"{name}.counts"] = row[:, None]
        tensors[f"blk.{layer}.attn_q.weight.counts"] = np.full((1, 1), 99)
    return gguf_bytes(tensors)


def stat_bytes(counts: np.ndarray = COUNTS) -> bytes:
    """SGLang's recorder in mode stat: counts of two steps."""
    steps = torch.tensor(np.stack([counts - counts // 2, counts // 2]), dtype=torch.int32)
    return torch_bytes({"rank": 0, "logical_count": steps, "average_utilization_rate": 0.5})


def per_pass_bytes() -> bytes:
    """Mode per_pass: two passes over five physical experts, of which two are expert 0."""
    table = torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, 0]])
    one, two = (
        torch.tensor([[2, 1, 1, 0, 1], [1, 1, 2, 0, 0]]),
        torch.zeros(2, 5, dtype=torch.int32),
    )
    two[0, 4], two[1] = 3, torch.tensor([1, 2, 1, 0, 0])
    records = [
        {"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": c}
        for i, c in enumerate((one, two))
    ]
    return torch_bytes({"records": records, "last_physical_to_logical_map": table})


def json_bytes(counts: Any = COUNTS) -> bytes:
    return json.dumps({"logical_count": np.asarray(counts).tolist()}).encode()


FILES = {
    "imatrix": ("a.gguf", imatrix_bytes, "llama.cpp imatrix"),
    "stat": ("a.pt", stat_bytes, "SGLang recorder"),
    "per_pass": ("a.pt", per_pass_bytes, "SGLang recorder"),
    "json": ("a.json", json_bytes, "SGLang counts"),
    "npy": ("a.npy", lambda: npy_bytes(COUNTS), "npy"),
    "npy floats": ("a.npy", lambda: npy_bytes(COUNTS / 7), "npy"),
}


def load(tmp_path: Path, data: bytes, model: MoESpec = MODEL, name: str = "p") -> Profile:
    path = tmp_path / name
    path.write_bytes(data)
    return load_profile(path, model)


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_counts_becomes_shares_of_k(tmp_path: Path, kind: str) -> None:
    name, make, says = FILES[kind]
    profile = load(tmp_path, make(), name=name)
    np.testing.assert_allclose(profile.load, SHARES, rtol=1e-6)
    assert (profile.kind, Path(profile.source).name) == (says, name)
    assert len(profile.sha256) == 64
    again = load_profile(profile, MODEL)
    np.testing.assert_allclose(again.load, SHARES, rtol=1e-6)
    assert again.facts() == profile.facts()


def test_arrays_are_taken_as_they_are() -> None:
    profile = load_profile(COUNTS, MODEL)
    np.testing.assert_allclose(profile.load, SHARES)
    assert profile.kind == "array"


def test_dense_layers_are_rows_of_zeros_or_not_there(tmp_path: Path) -> None:
    model = replace(MODEL, n_dense_layers=1, dense_size=8)
    with_dense = np.concatenate([[[0, 0, 0, 0]], COUNTS])
    for data in (stat_bytes(with_dense), json_bytes(with_dense), imatrix_bytes(first=1)):
        np.testing.assert_allclose(load(tmp_path, data, model).load, SHARES, rtol=1e-6)
    with_dense[0, 0] = 1
    with pytest.raises(ValueError, match=r"must be \[n_layers, n_experts\] = \[2, 4\] .*, got \[3"):
        load(tmp_path, stat_bytes(with_dense), model)


def test_a_recording_gives_its_train_split_or_all_its_rows(tmp_path: Path) -> None:
    trace = make_trace()
    trace.save(tmp_path / "t")
    profile = load_profile(tmp_path / "t", MODEL)
    expected = train_profile(trace)
    assert expected is not None
    np.testing.assert_allclose(profile.load, expected)
    assert profile.kind == "train split of a recording"
    few = make_trace(n_conversations=3)
    few.save(tmp_path / "few")
    profile = load_profile(tmp_path / "few", MODEL)
    ids = few.expert_ids.astype(np.int64)
    counts = np.stack([np.bincount(ids[:, layer].ravel(), minlength=4) for layer in range(2)])
    np.testing.assert_allclose(profile.load, counts / few.n_rows)
    assert profile.kind == "all rows of a recording"


REFUSED = {
    "another shape": (npy_bytes(np.ones((2, 5))), r"must be \[n_layers, n_experts\] = \[2, 4\]"),
    "three axes": (npy_bytes(np.ones((1, 2, 4))), "must be numbers"),
    "texts": (npy_bytes(np.array([["a"] * 4] * 2)), "must be numbers"),
    "objects": (npy_bytes(np.array([[None] * 4] * 2)), "must hold numbers"),
    "negative": (npy_bytes(-COUNTS), "must be finite and >= 0"),
    "nan": (npy_bytes(np.full((2, 4), np.nan)), "must be finite"),
    "an empty layer": (npy_bytes(COUNTS * [[1], [0]]), "must have counts, got 0 in layer 1"),
    "dense gguf": (
        gguf_bytes({"blk.0.attn_q.weight.counts": np.ones((1, 1))}),
        "must hold tensors",
    ),
    "gguf without its end": (imatrix_bytes()[:-200], "inside the file"),
    "gguf of many facts": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60),
        "bytes announced at byte 24",
    ),
    "gguf with a long text": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50) + b"key",
        "truncated or damaged GGUF",
    ),
    "gguf with a long array": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 12, 2**61),
        "truncated or damaged GGUF",
    ),
    "gguf 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3, got 1"),
    "torn layers": (
        gguf_bytes({f"blk.{i}.ffn_up_exps.weight.counts": np.ones((4 + i, 1)) for i in range(2)}),
        r"same number of experts in all layers, got \[4, 5\]",
    ),
    "ragged": (b'{"logical_count": [[1, 2, 3, 4], [1]]}', "regular array"),
    "long text": (b'{"logical_count": [["' + b"x" * 10**6 + b'", 2], [3, 4]]}', "regular array"),
    "deep": (b'{"logical_count": ' + b"[" * 500 + b"]" * 500 + b"}", "regular array"),
    "no counts": (b'{"counts": []}', "must be an imatrix GGUF"),
    "other torch": (torch_bytes([1, 2]), "must hold a dict, got list"),
    "no records": (torch_bytes({"a": 1}), "must hold logical_count, or a list of records"),
    "huge tensor": (
        torch_bytes({"logical_count": torch.zeros(1, dtype=torch.int32).expand(10**4, 10**4, 9)}),
        "must have at most",
    ),
    "noise": (bytes(range(1, 200)), "must be an imatrix GGUF"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_profile_is_one_sentence(tmp_path: Path, kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, data, name="evil.bin")
    assert "evil.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_records_that_name_one_tensor_many_times_are_refused(tmp_path: Path) -> None:
    counts = torch.ones(2, 1000, dtype=torch.int32)
    table = torch.arange(1000).repeat(2, 1)
    records = [{"global_physical_count": counts}] * 1000
    data = torch_bytes({"records": records, "last_physical_to_logical_map": table})
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="must have at most"):
        load(tmp_path, data)


class Told:
    """Answers like ``all_far`` and remembers the profile it was told."""

    seen: Any = None

    def reset(self, context: PolicyContext) -> None:
        Told.seen = context.profile
        self.plan = all_far(context.model, context.system)

    def __call__(self, observation: Any) -> Plan:
        return self.plan


def run(profile: Any, trace: RoutingTrace | None = None) -> Any:
    trace = trace or make_trace(n_conversations=3)
    return evaluate(
        [Told, "static_popularity"], trace, MODEL, SYSTEM, batch_sizes=(2,), window=4,
        hbm_budget=0.3, profile=profile,
    )  # fmt: skip


def test_a_profile_stands_in_where_a_recording_has_no_train_split(tmp_path: Path) -> None:
    without = run(None)
    row = next(r for r in without.rows if r["policy"] == "static_popularity")
    assert (row["validity"], without.provenance["profile"]) == ("n/a", None)
    assert "--profile" in row["validity_reasons"][0]
    assert Told.seen is None
    path = tmp_path / "m.gguf"
    path.write_bytes(imatrix_bytes())
    given = run(path)
    np.testing.assert_allclose(Told.seen, SHARES, rtol=1e-6)
    row = next(r for r in given.rows if r["policy"] == "static_popularity")
    assert row["tokens_per_s"] > 0
    assert f"popularity profile: {path}" in row["notes"]
    facts = given.provenance["profile"]
    assert facts["kind"] == "llama.cpp imatrix"
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_given_profile_replaces_that_of_the_train_split() -> None:
    trace = make_trace()
    run(None, trace)
    np.testing.assert_allclose(Told.seen, train_profile(trace))
    run(COUNTS, trace)
    np.testing.assert_allclose(Told.seen, SHARES)


def test_a_profile_of_the_evaluated_rows_is_refused(tmp_path: Path) -> None:
    few = make_trace(n_conversations=3).save(tmp_path / "few")
    with pytest.raises(ValueError, match="must not be counted on the rows that are evaluated"):
        run(tmp_path / "few", few)
    make_trace(n_conversations=3, seed=1).save(tmp_path / "other")
    assert run(tmp_path / "other", few).provenance["profile"]["kind"].startswith("all rows")


def test_explain_takes_a_profile_too() -> None:
    trace = make_trace(n_conversations=3)
    options: Any = {"batch_size": 2, "window": 4, "hbm_budget": 0.3}
    with pytest.raises(ValueError, match="train profile"):
        explain("static_popularity", "all_far4", trace, MODEL, SYSTEM, **options)
    found = explain(
        "static_popularity", "all_far4", trace, MODEL, SYSTEM, profile=COUNTS, **options
    )
    assert found.a.hit_rate > 0


def test_the_command_line_names_the_profile_and_refuses_another_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.npy", tmp_path / "r.json"
    bad.write_bytes(npy_bytes(COUNTS))
    arguments = ["evaluate", "--policies", "static_popularity", "--max-windows", "1"]
    assert main([*arguments, "--profile", str(bad), "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert "bad.npy: a profile for minimoe" in error.lower()
    assert error.count("\n") == 1
    good = tmp_path / "good.npy"
    np.save(good, np.ones((8, 64)))
    assert main([*arguments, "--profile", str(good), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["provenance"]["profile"]["source"] == str(good)
