"""Importers of SGLang, Megatron and llama.cpp output, in each engine's exact layout."""

import base64
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ndp_gym.importers import ImportOptions, import_trace
from tests.test_importers import random_ids, written

TOP_2 = ImportOptions(top_k=2)


def sglang_response(ids: np.ndarray, n_prompt: int, start: int = 0) -> dict:
    """A ``/generate`` response; ``ids`` [forwarded tokens, all layers, K]."""
    meta = {
        "id": "a",
        "prompt_tokens": n_prompt,
        "completion_tokens": start + len(ids) + 1 - n_prompt,
        "routed_experts": base64.b64encode(ids.astype(np.int32).tobytes()).decode(),
    }
    return {"text": "x", "meta_info": meta}


def recorder_record(ids: np.ndarray, positions: list[int], mode: int, number: int) -> dict:
    """A per-token record; ``ids`` [tokens, L, K] physical, padded to top-8 with -1."""
    padded = np.full((ids.shape[1], ids.shape[0], 8), -1, dtype=np.int32)
    padded[:, :, : ids.shape[2]] = ids.transpose(1, 0, 2)
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": torch.zeros(ids.shape[1], 8, dtype=torch.int32),
        "input_ids": [1] * len(positions),
        "positions": positions,
        "extend_seq_lens": None,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(padded),
        "misc_objects": [],
    }


def recorder_content(ids: dict[str, np.ndarray]) -> dict:
    """Two requests, ``a`` prefilled in two chunks, then both decoded together."""
    a, b = ids["a"], ids["b"]
    passes = [
        recorder_record(a[:4], [0, 1, 2, 3], 1, 0) | {"extend_seq_lens": [4]},
        recorder_record(np.concatenate([a[4:6], b[:3]]), [4, 5, 9, 10, 11], 1, 1)
        | {"extend_seq_lens": [2, 3]},
    ]
    for step in range(10):
        both = np.stack([a[6 + step], b[3 + step]])
        passes.append(recorder_record(both, [6 + step, 12 + step], 2, 2 + step))
    table = torch.arange(8).repeat(a.shape[1], 1)
    return {"records": passes, "last_physical_to_logical_map": table}


def torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def megatron_lines(ids: list[np.ndarray], rank: int = 0, **extra: object) -> list[str]:
    lines = []
    for step, tokens in enumerate(ids):
        for layer in range(tokens.shape[1]):
            line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer + 1}
            line |= {"rank": rank, "num_tokens": len(tokens), "topk": tokens.shape[2]}
            lines.append(json.dumps(line | {"top_indices": tokens[:, layer].tolist()} | extra))
    return lines


def csv_bytes(ids: np.ndarray, skipped: int = 0) -> bytes:
    """Layer-major, the last layer of the first ``skipped`` tokens not computed."""
    lines = ["token,layer,expert"]
    for layer in range(ids.shape[1]):
        first = skipped if layer == ids.shape[1] - 1 else 0
        lines += [f"{t},{layer},{e}" for t in range(first, len(ids)) for e in ids[t, layer]]
    return ("\n".join(lines) + "\n").encode()


def two_requests() -> dict[str, np.ndarray]:
    return {"a": random_ids(16), "b": random_ids(13)}


MAKERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "sglang": ("a.json", lambda: json.dumps(sglang_response(random_ids(30), 10)).encode()),
    "sglang-recorder": ("a.pt", lambda: torch_bytes(recorder_content(two_requests()))),
    "megatron": ("a.jsonl", lambda: "\n".join(megatron_lines([random_ids(30)])).encode()),
    "llama-csv": ("a.csv", lambda: csv_bytes(random_ids(40))),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_recognised_packed_or_not(tmp_path, kind, packed):
    name, make = MAKERS[kind]
    data = make()
    path = written(tmp_path, name + ".gz" * packed, gzip.compress(data) if packed else data)
    result = import_trace([path], options=TOP_2)
    assert result.format == kind
    assert result.trace.save(tmp_path / "out").sha256 == result.trace.sha256
    assert import_trace([tmp_path / path.name], kind, TOP_2).trace.sha256 == result.trace.sha256


def test_sglang_drops_dense_layers_and_keeps_what_was_not_returned(tmp_path):
    ids = random_ids(30, n_layers=3)
    full = np.concatenate([np.zeros((30, 1, 2), dtype=np.int64), ids], axis=1)
    path = written(tmp_path, "a.json", json.dumps([sglang_response(full, 10)] * 2).encode())
    trace = import_trace([path], options=TOP_2).trace
    np.testing.assert_array_equal(trace.expert_ids[:30], ids)
    assert trace.metadata.layer_ids == (1, 2, 3)
    assert trace.requests.n_prompt.tolist() == [10, 10]
    with pytest.raises(ValueError, match=r"say --top-k, or --model"):
        import_trace([path])
    with pytest.raises(ValueError, match=r"must be int32 \[tokens, layers, 7\]"):
        import_trace([path], options=ImportOptions(top_k=7))


def test_sglang_knows_layers_and_k_of_a_preset_so_that_late_starts_are_seen(tmp_path):
    ids = random_ids(20, n_layers=32)
    data = json.dumps(sglang_response(ids, 10, start=4)).encode()
    path = written(tmp_path, "a.json", data)
    trace = import_trace([path], options=ImportOptions(model="mixtral-8x7b")).trace
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert (trace.requests.context_offset[0], trace.requests.n_prompt[0]) == (4, 6)
    assert trace.metadata.preset == "mixtral-8x7b"


def test_recorder_passes_become_requests_by_position(tmp_path):
    ids = two_requests()
    path = written(tmp_path, "a.pt", torch_bytes(recorder_content(ids)))
    result = import_trace([path])
    trace = result.trace
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([ids["a"], ids["b"]]))
    assert trace.requests.length.tolist() == [16, 13]
    assert trace.requests.n_prompt.tolist() == [6, 3]
    assert trace.requests.context_offset.tolist() == [0, 9]
    assert trace.n_experts == 8
    assert not any("moved" in warning for warning in result.warnings)


def test_recorder_maps_physical_experts_and_drops_dense_layers(tmp_path):
    content = recorder_content(two_requests())
    plain = import_trace([written(tmp_path, "a.pt", torch_bytes(content))]).trace
    turned = torch.arange(8).flip(0)
    content["last_physical_to_logical_map"] = turned.repeat(2, 1)
    result = import_trace([written(tmp_path, "b.pt", torch_bytes(content))])
    np.testing.assert_array_equal(result.trace.expert_ids, 7 - plain.expert_ids)
    assert any("moved or doubled" in warning for warning in result.warnings)
    for record in content["records"]:
        record["topk_ids_of_layer"][0] = -1
    dense = import_trace([written(tmp_path, "c.pt", torch_bytes(content))]).trace
    assert dense.metadata.layer_ids == (1,)


def test_what_holds_counts_only_is_refused_with_advice(tmp_path):
    counts = {"rank": 0, "logical_count": torch.zeros(2, 2, 8, dtype=torch.int32)}
    per_pass = {
        "records": [{"forward_pass_id": 0, "global_physical_count": torch.zeros(2, 8)}],
        "last_physical_to_logical_map": torch.zeros(2, 8, dtype=torch.int64),
    }
    for content in (counts, per_pass):
        path = written(tmp_path, "a.pt", torch_bytes(content))
        with pytest.raises(ValueError, match=r"a\.pt: .*cannot be replayed: .*per_token, or use"):
            import_trace([path])
    as_json = b'{"logical_count": [[1, 2], [3, 4]]}'
    with pytest.raises(ValueError, match=r"a\.json: .*cannot be replayed: .*--profile"):
        import_trace([written(tmp_path, "a.json", as_json)])
    key = b"imatrix.chunk_count"
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<II", 4, 1)
    for data, kind in ((header, "an importance matrix"), (header[:24] + b"\0" * 9, "a GGUF file")):
        with pytest.raises(ValueError, match=rf"a\.gguf: {kind} holds sums over a text"):
            import_trace([written(tmp_path, "a.gguf", data)])


def test_nothing_in_a_torch_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = written(tmp_path, "a.pt", torch_bytes({"records": [Evil()]}))
    with pytest.raises(ValueError, match="without running code"):
        import_trace([path])
    assert not (tmp_path / "executed").exists()


def test_torch_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    content = recorder_content(two_requests())
    content["records"][0]["topk_ids_of_layer"] = torch.zeros(1, dtype=torch.int32).expand(
        10**4, 10**4, 10**4
    )
    with pytest.raises(ValueError, match="must have at most"):
        import_trace([written(tmp_path, "a.pt", torch_bytes(content))])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(ValueError, match="uncompressed entries"):
        import_trace([written(tmp_path, "b.pt", file.getvalue())])


def test_megatron_steps_of_one_token_continue_a_request(tmp_path):
    ids = random_ids(40)
    steps = [ids[:10], ids[10:11], ids[11:12], ids[12:30], *np.split(ids[30:], 10)]
    lines = megatron_lines(steps)
    mtp = megatron_lines([ids[:10]], block="mtp", mtp_idx=0)
    path = written(tmp_path, "a.jsonl", "\n".join(lines + mtp).encode())
    result = import_trace([path])
    np.testing.assert_array_equal(result.trace.expert_ids, ids)
    assert result.trace.requests.length.tolist() == [12, 28]
    assert result.trace.requests.n_prompt.tolist() == [10, 18]
    assert result.trace.metadata.layer_ids == (1, 2)
    assert any("2 lines of other blocks" in warning for warning in result.warnings)
    short = written(tmp_path, "b.jsonl", "\n".join(lines[:-1]).encode())
    with pytest.raises(ValueError, match=r"rank 0, step 13 must have the layers \[1, 2\]"):
        import_trace([short])


def test_megatron_ranks_are_other_requests(tmp_path):
    one, two = random_ids(10), random_ids(12)
    paths = [
        written(tmp_path, f"{rank}.jsonl", "\n".join(megatron_lines([ids], rank)).encode())
        for rank, ids in enumerate((one, two))
    ]
    trace = import_trace(paths).trace
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([one, two]))
    assert trace.requests.length.tolist() == [10, 12]


def test_csv_rows_are_placed_by_key_and_short_prompts_are_dropped(tmp_path):
    ids = random_ids(30)
    trace = import_trace([written(tmp_path, "a.csv", csv_bytes(ids))]).trace
    np.testing.assert_array_equal(trace.expert_ids, ids)
    result = import_trace([written(tmp_path, "b.csv", csv_bytes(ids, skipped=9))])
    np.testing.assert_array_equal(result.trace.expert_ids, ids[9:])
    assert result.trace.requests.context_offset.tolist() == [9]
    assert any("9 tokens at the start lack layers" in warning for warning in result.warnings)
    more = b"layer,expert,p,token\n" + b"".join(
        b"%d,%d,.5,%d\n" % (layer, e, t) for t in range(5) for layer in (3, 4) for e in ids[t, 0]
    )
    named = import_trace([written(tmp_path, "c.csv", more)]).trace
    assert named.metadata.layer_ids == (3, 4)
    gap = csv_bytes(ids).replace(b"\n20,1,", b"\n21,1,", 1)
    with pytest.raises(ValueError, match="token 20 must have 2 experts in each of 2 layers"):
        import_trace([written(tmp_path, "d.csv", gap)])
