"""The routing trace: file round trip, checks of hostile files, splits, windows."""

import json
import pickle
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trace
from safetensors.numpy import load_file

from ndp_gym.trace import Requests, RoutingTrace, TraceMetadata
from ndp_gym.trace_requests import assign_splits
from ndp_gym.trace_spans import find_shared_span


def saved(trace: RoutingTrace, folder: Path) -> Path:
    path = folder / "t.safetensors"
    trace.save(path)
    return path


def flat_requests(n_requests: int, length: int, split: np.ndarray | None = None) -> Requests:
    index = np.arange(n_requests)
    zeros = np.zeros(n_requests, dtype=np.int64)
    return Requests(
        start=index * length,
        n_prompt=zeros + 1,
        length=zeros + length,
        context_offset=zeros,
        conversation=index,
        domain=zeros,
        split=zeros + 2 if split is None else split,
        domains=("all",),
    )


def test_a_saved_trace_reads_back_equal_here_and_with_the_safetensors_library(tiny_trace, tmp_path):
    path = saved(tiny_trace, tmp_path)
    opened, library = RoutingTrace.open(path), load_file(path)
    for name in ("expert_ids", "gate_weights"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(tiny_trace, name))
        np.testing.assert_array_equal(getattr(opened, name), library[name])
    np.testing.assert_array_equal(opened.requests.table(), tiny_trace.requests.table())
    assert opened.metadata == tiny_trace.metadata
    assert opened.sha256 == tiny_trace.sha256
    assert opened.requests.domain_names()[:3] == tiny_trace.requests.domain_names()[:3]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("in_file", [True, False])
def test_pickle_keeps_the_trace(tiny_trace, tmp_path, in_file):
    trace = RoutingTrace.open(saved(tiny_trace, tmp_path)) if in_file else tiny_trace
    assert pickle.loads(pickle.dumps(trace)).sha256 == tiny_trace.sha256


def test_ids_are_uint8_up_to_256_experts_and_uint16_above():
    for n_experts, dtype in ((256, np.uint8), (257, np.uint16)):
        metadata = TraceMetadata(model="m", n_experts=n_experts, top_k=1)
        ids = np.full((3, 1, 1), n_experts - 1)
        trace = RoutingTrace.from_arrays(ids, flat_requests(1, 3), metadata)
        assert trace.expert_ids.dtype == dtype
        assert int(trace.expert_ids.max()) == n_experts - 1


def test_opening_maps_the_content_and_does_not_scan_it(tiny_trace, tmp_path, monkeypatch):
    path = saved(tiny_trace, tmp_path)
    monkeypatch.setattr(RoutingTrace, "_scan", lambda *_: pytest.fail("scanned at open"))
    trace = RoutingTrace.open(path)
    assert trace.expert_ids.base is not None


def test_split_is_by_conversation_and_50_25_25_in_every_domain():
    conversation = np.repeat(np.arange(400), 2)
    domain = conversation % 4
    split = assign_splits(conversation, domain, seed=1)
    assert (split[::2] == split[1::2]).all()
    for d in range(4):
        assert np.bincount(split[domain == d], minlength=3).tolist() == [100, 50, 50]
    assert (split != assign_splits(conversation, domain, seed=2)).any()


def test_a_recording_with_15_conversations_is_for_evaluation_only():
    trace = make_trace(n_conversations=15)
    assert len(trace.split_requests("test")) == len(trace.requests)
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="evaluation only"):
            trace.split_requests(split)
    with pytest.raises(ValueError, match="split must be one of"):
        trace.split_requests("dev")


def test_splits_partition_the_requests_and_change_with_the_seed(tiny_trace):
    parts = [tiny_trace.split_requests(s) for s in ("train", "val", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(tiny_trace.requests)))
    again = tiny_trace.assign_splits(7)
    assert again.requests.split.tolist() != tiny_trace.requests.split.tolist()
    np.testing.assert_array_equal(again.expert_ids, tiny_trace.expert_ids)


def test_tiled_layers_repeat_and_are_labelled(tiny_trace):
    tiled = tiny_trace.tile_layers(5)
    np.testing.assert_array_equal(tiled.expert_ids, tiny_trace.expert_ids[:, [0, 1, 0, 1, 0]])
    assert tiled.metadata.tiled_from == 2
    assert "tiled from 2 to 5" in tiled.metadata.model
    with pytest.raises(ValueError, match="n_layers must be at least"):
        tiny_trace.tile_layers(1)


def test_window_gives_the_slice_and_refuses_rows_outside(tiny_trace):
    ids, gates = tiny_trace.window(3, 5)
    np.testing.assert_array_equal(ids, tiny_trace.expert_ids[3:8])
    np.testing.assert_array_equal(gates, tiny_trace.gate_weights[3:8])
    for first, n in ((-1, 2), (0, 0), (tiny_trace.n_rows - 1, 2)):
        with pytest.raises(ValueError, match="window must lie in rows"):
            tiny_trace.window(first, n)


CORRUPTIONS = {
    "expert_ids must be in 0..n_experts-1=3, got 9": ("expert_ids", 9),
    "expert_ids must be distinct": ("expert_ids", None),
    "gate_weights must be finite and >= 0, got nan": ("gate_weights", np.nan),
    "gate_weights must be finite and >= 0, got -1": ("gate_weights", -1.0),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_bad_content_is_found_by_the_window_that_holds_it_and_by_verify(
    tiny_trace, tmp_path, message
):
    path = saved(tiny_trace, tmp_path)
    clean = RoutingTrace.open(path)
    tensor, value = CORRUPTIONS[message]
    request = tiny_trace.requests
    row = int(request.start[1]) + 2
    mapped = getattr(clean, tensor)
    offset = np.memmap(path, mode="r").nbytes - sum(
        getattr(clean, n).nbytes for n in ("expert_ids", "gate_weights")
    )
    if tensor == "expert_ids":
        offset += clean.gate_weights.nbytes
    writable = np.memmap(path, dtype=mapped.dtype, mode="r+", offset=offset, shape=mapped.shape)
    writable[row, 1, 0] = writable[row, 1, 1] if value is None else value
    writable.flush()
    trace = RoutingTrace.open(path)
    trace.window(0, 3)
    with pytest.raises(ValueError, match=message) as caught:
        trace.window(row, 1)
    assert str(path) in str(caught.value)
    assert f"row {row}, layer 1" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        trace.verify()


def test_known_rows_are_not_scanned_again(tiny_trace, tmp_path, monkeypatch):
    trace = RoutingTrace.open(saved(tiny_trace, tmp_path))
    first, n = trace.requests.start[:8] + 2, np.full(8, 4)
    trace.check_rows(first, n)
    monkeypatch.setattr(trace, "_scan", lambda *_: pytest.fail("scanned again"))
    trace.check_rows(first, n)


@pytest.mark.parametrize(
    ("column", "index", "value"),
    [
        ("start", 1, 0),
        ("start", 0, -1),
        ("start", 0, 10**12),
        ("length", 0, 0),
        ("length", 3, 2**62),
        ("n_prompt", 2, 10**6),
        ("n_prompt", 2, -1),
        ("context_offset", 0, -1),
        ("conversation", 0, -5),
        ("domain", 0, 2),
        ("split", 0, 3),
    ],
)
def test_a_bad_request_table_is_one_error_naming_the_field(tiny_trace, column, index, value):
    values = getattr(tiny_trace.requests, column).copy()
    values[index] = value
    requests = replace(tiny_trace.requests, **{column: values})
    with pytest.raises(ValueError, match=rf"requests\.{column}"):
        RoutingTrace(tiny_trace.expert_ids, None, requests, tiny_trace.metadata)


def test_a_conversation_in_two_splits_is_an_error(tiny_trace):
    split = tiny_trace.requests.split.copy()
    split[0] = (split[1] + 1) % 3
    with pytest.raises(ValueError, match="same for all requests of a conversation"):
        RoutingTrace.from_arrays(
            tiny_trace.expert_ids, replace(tiny_trace.requests, split=split), tiny_trace.metadata
        )


def shared_text_trace(n_shared: int, jitter: float) -> RoutingTrace:
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((20 * 100, 8, 16)), axis=2)[:, :, :2]
    split = np.array([i % 3 for i in range(20)], dtype=np.int64)
    ids[700 : 700 + n_shared] = ids[30 : 30 + n_shared, :, ::-1]  # request 7 (val) copies 0 (train)
    changed = rng.random((n_shared, 8)) < jitter
    ids[700 : 700 + n_shared][changed, 0] = 15 - ids[700 : 700 + n_shared][changed, 1]
    metadata = TraceMetadata(model="m", n_experts=16, top_k=2)
    return RoutingTrace.from_arrays(ids, flat_requests(20, 100, split), metadata)


@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_text_of_64_tokens_in_two_splits_is_leakage(tmp_path, jitter):
    trace = shared_text_trace(64, jitter)
    with pytest.raises(ValueError, match="in different splits"):
        trace.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_text_of_63_tokens_in_two_splits_is_allowed():
    trace = shared_text_trace(63, 0.0)
    assert find_shared_span(trace.expert_ids, trace.requests) is None


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewritten(path: Path, header: object, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


HEADER_EDITS = {
    "dtype": lambda h: h["expert_ids"].update(dtype="F64"),
    "shape": lambda h: h["expert_ids"].update(shape=[2**40, 2**40, 2**40]),
    "data_offsets": lambda h: h["expert_ids"].update(data_offsets=[0, 8]),
    "negative shape": lambda h: h["expert_ids"].update(shape=[-1, 2, 2]),
    "missing tensor": lambda h: h.pop("requests"),
    "extra key": lambda h: h["expert_ids"].update(pickle="yes"),
    "no metadata": lambda h: h.pop("__metadata__"),
    "schema": lambda h: edit_metadata(h, schema_version=99),
    "n_experts": lambda h: edit_metadata(h, n_experts=10**30),
    "top_k": lambda h: edit_metadata(h, top_k=3),
    "id_order": lambda h: edit_metadata(h, id_order="random"),
    "domains": lambda h: edit_metadata(h, domains=["one"]),
    "expert_bytes": lambda h: edit_metadata(h, expert_bytes=[1]),
}


def edit_metadata(header: dict, **changes: object) -> None:
    facts = json.loads(header["__metadata__"]["ndp_gym"]) | changes
    header["__metadata__"]["ndp_gym"] = json.dumps(facts)


@pytest.mark.parametrize("edit", HEADER_EDITS)
def test_a_hostile_header_is_one_error_naming_the_file(tiny_trace, tmp_path, edit):
    path = saved(tiny_trace, tmp_path)
    header, body = header_of(path)
    HEADER_EDITS[edit](header)
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        RoutingTrace.open(rewritten(path, header, body))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"{}", b"[]", b"\xff\xfe", b'{"a":NaN}', b'{"a":1,"a":2}', b"1" * 9999]
)
def test_a_header_that_is_no_object_is_one_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        RoutingTrace.open(rewritten(tmp_path / "t.safetensors", text, b"12345678"))


def test_every_truncation_and_many_flipped_bytes_are_refused_or_still_valid(tiny_trace, tmp_path):
    path = saved(tiny_trace, tmp_path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in rng.integers(0, len(data), 60):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"t\.safetensors"):
            RoutingTrace.open(path)
    for _ in range(300):
        mutated = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            mutated[at] = rng.integers(256)
        path.write_bytes(mutated)
        with suppress(ValueError):
            RoutingTrace.open(path).verify()


def test_a_file_with_a_huge_header_length_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match="header length must be at most"):
        RoutingTrace.open(path)


@pytest.mark.parametrize("data", [b"", b"PK", b'{"meta": {}}\n', b"\x1f\x8b" + bytes(20)])
def test_a_file_of_another_kind_is_to_be_imported_first(tmp_path, data):
    path = tmp_path / "foreign.jsonl"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"foreign\.jsonl: is not a routing trace: import it first"
    ):
        RoutingTrace.open(path)
