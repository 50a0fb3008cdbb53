"""Importers: small files by hand, options and refusals."""

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.importers import FORMATS, ImportOptions, import_trace

RNG = np.random.default_rng(5)


def random_ids(n: int, n_layers: int = 2, n_experts: int = 8, top_k: int = 2) -> np.ndarray:
    return np.argsort(RNG.random((n, n_layers, n_experts)), axis=2)[:, :, :top_k]


def nvmoe_bytes(ids: np.ndarray, first_layer: int = 1) -> bytes:
    lines = [
        json.dumps([[first_layer + i, int(e)] for i, layer in enumerate(row) for e in layer])
        for row in ids
    ]
    return ("\n".join(lines) + "\n").encode()


def hdmoe_bytes(questions: int = 2) -> bytes:
    template = random_ids(526, 8)
    rows = []
    for _ in range(questions):
        first = np.concatenate([template, random_ids(150, 8)])
        rows += [first, first, random_ids(140, 8)]
    ids = np.concatenate(rows)
    return json.dumps({str(i): ids[:, i].tolist() for i in range(ids.shape[1])}).encode()


def bigmoe_bytes(n_prompt: int = 3, n_decode: int = 4, turns: int = 2) -> bytes:
    lines = ["# route_trace v1", "# model=/m/tiny.gguf arch=x n_layer=2 n_expert=8 n_expert_used=2"]
    lines += [f"# layer={i} expert_bytes={100 + i} dense_bytes=7" for i in range(2)]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    start = 0
    for turn in range(turns):
        ids = random_ids(n_prompt + n_decode)
        order = [(t, layer) for layer in range(2) for t in range(n_prompt)]
        order += [(t, layer) for t in range(n_prompt, n_prompt + n_decode) for layer in range(2)]
        for t, layer in order:
            for slot, weight in ((0, 0.75), (1, 0.25)):
                phase = int(t >= n_prompt)
                row = (turn, phase, start + t, layer, slot, ids[t, layer, slot], weight, 0, 0)
                lines.append(",".join(map(str, row)))
        start += n_prompt + n_decode
    return ("\n".join(lines) + "\n").encode()


def routertrace_bytes() -> bytes:
    selections = random_ids(20, top_k=1).tolist()
    content = {
        "version": 2,
        "tokens": 20,
        "layers": 2,
        "expertsPerLayer": 8,
        "topK": 1,
        "selections": selections,
        "source": {"kind": "captured", "model": {"id": "org/model"}},
    }
    return json.dumps(content).encode()


def nf4_bytes(n: int = 40) -> bytes:
    meta = {"model": "/m/tiny", "prompt": "code", "steps": n, "layers": 2, "top_k": 2}
    lines = [json.dumps({"meta": meta | {"n_experts": 8, "prompt_tokens": 64, "decode": True}})]
    for step, row in enumerate(np.sort(random_ids(n), axis=2).tolist()):
        lines.append(json.dumps({"step": step, "routed": {str(i): r for i, r in enumerate(row)}}))
    return "\n".join(lines).encode()


def npy_bytes(ids: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def response(ids: list[np.ndarray], **extra: object) -> dict:
    choices = [{"routed_experts": base64.b64encode(npy_bytes(i)).decode()} for i in ids]
    return {"model": "org/model", "choices": choices, **extra}


def vllm_bytes() -> bytes:
    ids = random_ids(30).astype(np.uint8)
    return json.dumps(response([ids], usage={"prompt_tokens": 10})).encode()


MAKERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nvmoe": ("a.tokens.jsonl", lambda: nvmoe_bytes(random_ids(200))),
    "hdmoe": ("experts_math_mixtral.json", hdmoe_bytes),
    "bigmoe": ("a.route.csv", bigmoe_bytes),
    "routertrace": ("a.json", routertrace_bytes),
    "grouped-nf4": ("a.jsonl", nf4_bytes),
    "vllm": ("b.json", vllm_bytes),
    "vllm-nested": ("c.json", lambda: json.dumps(random_ids(30).tolist()).encode()),
    "vllm-npy": ("a.npy", lambda: npy_bytes(random_ids(30).astype(np.int16))),
}


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_recognised_packed_or_not(tmp_path, kind, packed):
    name, make = MAKERS[kind]
    data = make()
    path = written(tmp_path, name + ".gz" * packed, gzip.compress(data) if packed else data)
    result = import_trace([path])
    assert result.format == kind.removesuffix("-npy").removesuffix("-nested")
    assert result.trace.save(tmp_path / "out").sha256 == result.trace.sha256
    assert import_trace([path], result.format).trace.sha256 == result.trace.sha256
    assert result.trace.metadata.recorder == f"imported from {result.format}"


def test_nvmoe_rows_layers_and_spans(tmp_path):
    ids = random_ids(500)
    path = written(tmp_path, "a.tokens.jsonl", nvmoe_bytes(ids))
    options = ImportOptions(spans=(200, 350), n_experts=9, licence="MIT", model="mine")
    result = import_trace([path], options=options)
    trace = result.trace
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert trace.requests.start.tolist() == [0, 200, 350]
    assert trace.requests.n_prompt.tolist() == [128, 128, 128]
    assert trace.metadata.phases == "first 128 tokens taken as prefill"
    assert trace.metadata.layer_ids == (1, 2)
    assert (trace.n_experts, trace.metadata.licence, trace.metadata.model) == (9, "MIT", "mine")
    assert trace.requests.evaluation_only
    led = import_trace([path], options=ImportOptions(spans=(0, 200, 350))).trace
    assert led.requests.start.tolist() == trace.requests.start.tolist()
    for spans in ((0, 0), (300, 200), (500,)):
        with pytest.raises(ValueError, match=r"spans must ascend inside 1\.\.499"):
            import_trace([path], options=ImportOptions(spans=spans))


def test_without_spans_one_request_and_a_warning(tmp_path):
    path = written(tmp_path, "a.jsonl", nvmoe_bytes(random_ids(200)))
    result = import_trace([path])
    assert len(result.trace.requests) == 1
    assert any("--spans" in warning for warning in result.warnings)
    assert any("largest id + 1 = 8" in warning for warning in result.warnings)


def test_hdmoe_drops_template_and_repeated_turn(tmp_path):
    path = written(tmp_path, "experts_math_mixtral.json", hdmoe_bytes(2))
    result = import_trace([path])
    trace = result.trace
    assert "2,404 of 2,984 rows dropped: 1,052 are the 526-row template" in result.warnings[0]
    assert "1,352 are first turns that second turns prefill again" in result.warnings[0]
    assert trace.requests.length.tolist() == [150, 140, 150, 140]
    assert trace.requests.context_offset.tolist() == [526, 676, 526, 676]
    assert trace.requests.conversation.tolist() == [0, 0, 1, 1]
    assert trace.requests.domains == ("math",)


def test_bigmoe_places_layer_major_prefill_and_keeps_gates(tmp_path):
    data = bigmoe_bytes()
    trace = import_trace([written(tmp_path, "a.csv", data)]).trace
    assert trace.requests.n_prompt.tolist() == [3, 3]
    assert trace.requests.context_offset.tolist() == [0, 7]
    assert trace.requests.n_conversations == 1
    assert trace.metadata.expert_bytes == (100, 101)
    assert trace.metadata.phases == "recorded"
    np.testing.assert_array_equal(trace.gate_weights[..., 0], 0.75)
    rows = [line.split(",") for line in data.decode().splitlines() if line[0].isdigit()]
    for turn, _, step, layer, slot, expert, *_ in rows:
        row = int(step)
        assert trace.expert_ids[row, int(layer), int(slot)] == int(expert), turn
    unknown = import_trace([written(tmp_path, "b.csv", data.replace(b"0.25", b"nan", 1))])
    assert unknown.trace.gate_weights is None
    assert "without gate weights" in unknown.warnings[0]


def test_routertrace_takes_spans_from_the_sidecar(tmp_path):
    path = written(tmp_path, "a.json", routertrace_bytes())
    spans = [
        {"id": "code-1", "token_start": 0, "token_end_exclusive": 12},
        {"id": "math-1", "token_start": 12, "token_end_exclusive": 20},
    ]
    sidecar = json.dumps({"prompt_spans": spans}).encode()
    written(tmp_path, "capture-metadata.json", sidecar)
    trace = import_trace([path]).trace
    assert import_trace([tmp_path]).trace.sha256 == trace.sha256
    assert trace.requests.length.tolist() == [12, 8]
    assert trace.requests.domains == ("code", "math")
    with pytest.raises(ValueError, match="no request with decode rows"):
        trace.split_requests("test")
    written(tmp_path, "capture-metadata.json", sidecar.replace(b"20", b"21"))
    with pytest.raises(ValueError, match="must cover the 20 tokens"):
        import_trace([path])


def test_grouped_nf4_cuts_the_loop_unless_told_otherwise(tmp_path):
    ids = np.sort(random_ids(60), axis=2)
    ids[30:] = ids[28:30][np.arange(30) % 2]
    meta = {"model": "m", "prompt": "p", "steps": 60, "layers": 2, "top_k": 2, "n_experts": 8}
    lines = [{"meta": meta}]
    lines += [{"step": i, "routed": {"0": r[0], "1": r[1]}} for i, r in enumerate(ids.tolist())]
    data = "\n".join(map(json.dumps, lines)).encode()
    path = written(tmp_path, "a.jsonl", data)
    result = import_trace([path])
    assert result.trace.n_rows < 40
    assert "repeats itself" in result.warnings[0]
    assert any("(--prompt-tokens), or keep the loop" in text for text in result.warnings)
    assert import_trace([path], options=ImportOptions(keep_loops=True)).trace.n_rows == 60


def test_a_model_that_is_no_preset_is_said_to_be_a_name_only(tmp_path):
    path = written(tmp_path, "a.jsonl", nf4_bytes())
    result = import_trace([path], options=ImportOptions(model="mixtral"))
    assert result.trace.metadata.model == "mixtral"
    assert "'mixtral' is not a model preset" in result.warnings[0]
    assert "is not a model preset" not in " ".join(import_trace([path]).warnings)


def test_vllm_missing_rows_dense_layers_and_prompt(tmp_path):
    ids = random_ids(30, n_layers=3)
    full = np.concatenate([np.zeros((30, 1, 2), dtype=np.int64), ids], axis=1)
    full[:4] = -1
    content = response([full.astype(np.int32)], usage={"prompt_tokens": 10})
    trace = import_trace([written(tmp_path, "a.json", json.dumps(content).encode())]).trace
    np.testing.assert_array_equal(trace.expert_ids, ids[4:])
    assert trace.metadata.layer_ids == (1, 2, 3)
    assert (trace.requests.context_offset[0], trace.requests.n_prompt[0]) == (4, 6)
    assert trace.metadata.model == "org/model"


@pytest.mark.parametrize("wrap", ["array", "lines"])
def test_vllm_choices_of_one_response_are_one_conversation(tmp_path, wrap):
    responses = [response([random_ids(20).astype(np.uint8)] * 1) for _ in range(2)]
    responses[0]["choices"].append(responses[0]["choices"][0])
    text = json.dumps(responses) if wrap == "array" else "\n".join(map(json.dumps, responses))
    trace = import_trace([written(tmp_path, "a.json", text.encode())]).trace
    assert trace.requests.conversation.tolist() == [0, 0, 1]


def test_vllm_nested_lists_and_wrapped_blobs(tmp_path):
    ids = random_ids(12)
    lists = {
        "prompt_routed_experts": ids[:5].tolist(),
        "outputs": [{"routed_experts": ids[5:].tolist()}],
    }
    blob = {
        "data": base64.b64encode(ids.astype(np.int16).tobytes()).decode(),
        "shape": [12, 2, 2],
        "dtype": "int16",
        "start": 3,
    }
    for content, n_prompt, offset in ((lists, 5, 0), ({"routed_experts": blob}, 12, 3)):
        trace = import_trace([written(tmp_path, "a.json", json.dumps(content).encode())]).trace
        np.testing.assert_array_equal(trace.expert_ids, ids)
        assert (trace.requests.n_prompt[0], trace.requests.context_offset[0]) == (n_prompt, offset)


def test_several_files_become_one_trace_with_splits(tmp_path):
    for i in range(16):
        written(tmp_path, f"{i:02}.npy", npy_bytes(random_ids(40).astype(np.uint8)))
    result = import_trace([tmp_path], options=ImportOptions(n_prompt=(10,)))
    assert np.bincount(result.trace.requests.split).tolist() == [8, 4, 4]
    assert result.trace.metadata.phases == "given at import"
    assert import_trace(
        [tmp_path], options=ImportOptions(seed=9)
    ).trace.requests.split.tolist() != (result.trace.requests.split.tolist())


def test_text_shared_between_conversations_is_refused_until_its_prefix_is_dropped(tmp_path):
    prefix = random_ids(70)
    for i in range(16):
        ids = np.concatenate([prefix, random_ids(40)]).astype(np.uint8)
        written(tmp_path, f"{i:02}.npy", npy_bytes(ids))
    with pytest.raises(ValueError, match="in different splits"):
        import_trace([tmp_path])
    trace = import_trace([tmp_path], options=ImportOptions(drop_prefix=70)).trace
    assert trace.requests.length.tolist() == [40] * 16
    assert trace.requests.context_offset.tolist() == [70] * 16


def test_mixed_up_files_are_refused(tmp_path):
    csv = written(tmp_path, "a.route.csv", bigmoe_bytes())
    array = written(tmp_path, "b.npy", npy_bytes(random_ids(30).astype(np.uint8)))
    other = written(tmp_path, "c.npy", npy_bytes(random_ids(30, n_layers=3).astype(np.uint8)))
    with pytest.raises(ValueError, match=r"a\.route\.csv is bigmoe, b\.npy is vllm"):
        import_trace([csv, array])
    with pytest.raises(ValueError, match=r"c\.npy must have 2 layers"):
        import_trace([array, other])
    with pytest.raises(ValueError, match="given twice"):
        import_trace([array, array])
    with pytest.raises(ValueError, match="format must be one of"):
        import_trace([array], "parquet")


def test_a_folder_of_folders_is_said_not_to_be_searched(tmp_path):
    (tmp_path / "deeper").mkdir()
    written(tmp_path / "deeper", "a.jsonl", nf4_bytes())
    with pytest.raises(ValueError, match="its subfolders are not searched: name one of them"):
        import_trace([tmp_path])


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = written(tmp_path, "a.json.gz", gzip.compress(b" " * (80 * 2**20)))
    with pytest.raises(ValueError, match=r"a\.json\.gz: unpacks to more than"):
        import_trace([path])


HOSTILE = {
    "empty": b"",
    "blank": b"  \n \n",
    "binary": bytes(range(256)),
    "deep list": b"[[" * 100_000,
    "deep object": b'{"0": ' * 50_000,
    "huge number": b"[[1, " + b"9" * 5000 + b"]]",
    "big number": b"[[1, 99999999999999999999]]",
    "exponent": b"[[1, 1e300], [1, 2]]",
    "text": b'[["1", "2"]]',
    "nan": b"[[1, NaN]]",
    "negative": b"[[1, -3], [1, 4]]",
    "ragged layers": b'{"0": [[1, 2]], "1": [[1, 2], [3, 4]]}',
    "ragged ranks": b'{"0": [[1, 2], [3]]}',
    "gap in layers": b'{"0": [[1, 2]], "2": [[1, 2]]}',
    "no layer": b'{"0": []}',
    "npy pickle": npy_bytes(np.array([{"a": 1}], dtype=object)),
    "npy floats": npy_bytes(np.ones((2, 2, 2))),
    "npy flat": npy_bytes(np.ones(8, dtype=np.int64)),
    "npy lies": npy_bytes(random_ids(4)).replace(b"(4, 2, 2)", b"(9, 9, 9)"),
    "npy huge": npy_bytes(random_ids(4)).replace(b"(4, 2, 2), ", b"(9999999999999999, 2, 2),"),
    "npy repeats": npy_bytes(np.ones((4, 2, 2), dtype=np.int64)),
    "npy missing": npy_bytes(-np.ones((4, 2, 2), dtype=np.int64)),
    "response without data": b'{"choices": [{"routed_experts": null}]}',
    "response not base64": b'{"choices": [{"routed_experts": "%%%"}]}',
    "selections wrong": b'{"version": 2, "selections": [[[1]]], "tokens": 7}',
    "csv header only": b"# route_trace v1\nturn,phase,step,layer,slot,expert,weight\n",
    "csv wrong columns": b"# route_trace v1\na,b\n1,2\n",
    "csv huge": b"# route_trace v1\nturn,phase,step,layer,slot,expert,weight\n"
    b"0,0,0,0,2000000000,1,1\n",
    "meta only": b'{"meta": {"layers": 1, "top_k": 1, "steps": 1}}',
    "meta huge": b'{"meta": {"layers": 1, "top_k": 1, "steps": 99999999999999}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("forced", [None, *FORMATS])
def test_hostile_input_is_one_error_naming_the_file(tmp_path, kind, forced):
    path = written(tmp_path, "evil.bin", HOSTILE[kind])
    with pytest.raises(ValueError, match=r"evil\.bin"):
        import_trace([path], forced)
