"""vLLM's three generations in their exact layouts, the guide's lines, and rows not recorded."""

import base64
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ndp_gym.cli import main
from ndp_gym.importers import ImportOptions, import_trace
from ndp_gym.importers.recording import ImportResult
from tests.test_engine_importers import csv_bytes, recorder_content, sglang_response, torch_bytes
from tests.test_importers import bigmoe_bytes, nf4_bytes, npy_bytes, random_ids, written

GUIDE = Path(__file__).resolve().parent.parent / "docs/traces.md"
N_PROMPT, N_GENERATED, N_CACHED = 10, 6, 4
ROUTED = random_ids(N_PROMPT + N_GENERATED, n_layers=3)  # [tokens, routed layers, K]


def first_generation() -> dict[str, Any]:
    """0.21: int16, routed layers only, prompt and output apart, -1 where the prefix was cached."""
    prompt = ROUTED[:N_PROMPT].astype(np.int16)
    prompt[:N_CACHED] = -1
    return {"prompt_routed_experts": prompt, "routed_experts": ROUTED[N_PROMPT:].astype(np.int16)}


def second_generation(dtype: Callable[..., Any] = np.uint8) -> dict[str, Any]:
    """One array of all layers, a dense one first; -1 in a type without a sign; no last token."""
    full = np.zeros((N_PROMPT + N_GENERATED - 1, 4, 2), dtype=dtype)
    full[:, 1:] = ROUTED[:-1]
    full[:N_CACHED] = np.array(-1).astype(dtype)
    return {"routed_experts": full}


def third_generation() -> dict[str, Any]:
    """int32, and the first rows are not even there (``routed_experts_prompt_start``)."""
    ids = second_generation(np.int32)["routed_experts"]
    return {"routed_experts": ids[N_CACHED:]}


GENERATIONS = {
    "first": first_generation,
    "second uint8": second_generation,
    "second uint16": lambda: second_generation(np.uint16),
    "third": third_generation,
}


def check(result: ImportResult, n_generated: int) -> None:
    trace = result.trace
    np.testing.assert_array_equal(trace.expert_ids, ROUTED[N_CACHED : N_PROMPT + n_generated])
    assert trace.requests.context_offset.tolist() == [N_CACHED]
    assert trace.requests.n_prompt.tolist() == [N_PROMPT - N_CACHED]
    assert trace.requests.n_decode.tolist() == [n_generated]
    assert trace.metadata.extra["tokens_not_recorded"] == N_CACHED
    share = N_CACHED / (N_PROMPT + n_generated)
    said = f"4 of {N_PROMPT + n_generated} tokens ({share:.1%}, in 1 of 1 requests) have no record"
    assert any(said in warning for warning in result.warnings)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_lines_of_the_guide_save_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    blocks = re.findall(r"^```\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    (lines,) = [block for block in blocks if "from vllm import" in block]
    arrays = GENERATIONS[name]()
    output = SimpleNamespace(
        routed_experts=arrays["routed_experts"], token_ids=list(range(N_GENERATED))
    )
    answer = SimpleNamespace(
        prompt_token_ids=list(range(N_PROMPT)),
        outputs=[output],
        **{key: value for key, value in arrays.items() if key.startswith("prompt")},
    )
    vllm: Any = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace
    vllm.LLM = lambda *_, **options: SimpleNamespace(generate=lambda *_: [answer])
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, str(GUIDE), "exec"), {"prompts": ["x"]})
    result = import_trace([tmp_path / "recorded.jsonl"])
    assert result.format == "vllm"
    check(result, N_GENERATED if name == "first" else N_GENERATED - 1)


@pytest.mark.parametrize("name", ["second uint8", "second uint16", "third"])
def test_answers_of_the_server_hold_the_same_arrays_in_base64(tmp_path: Path, name: str) -> None:
    array = GENERATIONS[name]()["routed_experts"]
    choice = {"routed_experts": base64.b64encode(npy_bytes(array)).decode()}
    usage = {"prompt_tokens": N_PROMPT, "completion_tokens": N_GENERATED}
    content = {"choices": [choice], "usage": usage}
    path = written(tmp_path, "a.json", json.dumps(content).encode())
    check(import_trace([path]), N_GENERATED - 1)
    if name == "third":  # where the usage does not tell, the field of the request does
        content["usage"] = {"prompt_tokens": N_PROMPT}
        content["routed_experts_prompt_start"] = N_CACHED
        path = written(tmp_path, "b.json", json.dumps(content).encode())
        check(import_trace([path]), N_GENERATED - 1)


@pytest.mark.parametrize("name", ["second uint8", "third"])
def test_arrays_saved_alone_keep_what_they_say_about_missing_rows(
    tmp_path: Path, name: str
) -> None:
    array = GENERATIONS[name]()["routed_experts"]
    path = written(tmp_path, "a.npy", npy_bytes(array))
    trace = import_trace([path], options=ImportOptions(n_prompt=(N_PROMPT - N_CACHED,))).trace
    np.testing.assert_array_equal(trace.expert_ids, ROUTED[N_CACHED:-1])
    # rows that were left out leave no mark in an array of their own
    assert trace.requests.context_offset[0] == (0 if name == "third" else N_CACHED)


def test_the_last_of_256_experts_is_no_missing_row(tmp_path: Path) -> None:
    ids = random_ids(20, n_experts=256, top_k=8).astype(np.uint8)
    ids[3, 0] = [255, *range(7)]
    trace = import_trace([written(tmp_path, "a.npy", npy_bytes(ids))]).trace
    np.testing.assert_array_equal(trace.expert_ids, ids)
    assert "tokens_not_recorded" not in trace.metadata.extra


def test_rows_missing_in_the_middle_are_refused_and_at_the_end_dropped(tmp_path: Path) -> None:
    ids = random_ids(20).astype(np.int16)
    ids[15:] = -1
    trace = import_trace([written(tmp_path, "a.npy", npy_bytes(ids))]).trace
    assert (trace.n_rows, trace.requests.context_offset[0]) == (15, 0)
    assert trace.metadata.extra["tokens_not_recorded"] == 5
    ids[7] = -1
    with pytest.raises(ValueError, match=r"missing rows .* at its ends only, got one at row 7"):
        import_trace([written(tmp_path, "b.npy", npy_bytes(ids))])


def late_turn(data: bytes) -> bytes:
    """The BigMoeOnEdge file with every step 5 later."""
    lines = data.decode().splitlines()
    rows = [line.split(",") for line in lines if line[0].isdigit()]
    head = [line for line in lines if not line[0].isdigit()]
    return "\n".join(
        [*head, *(",".join([*row[:2], str(int(row[2]) + 5), *row[3:]]) for row in rows)]
    ).encode()


MISSING: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "sglang": (
        "a.json",
        lambda: json.dumps(sglang_response(random_ids(20, 32), 10, 4)).encode(),
        4,
    ),
    "sglang-recorder": (
        "a.pt",
        lambda: torch_bytes(recorder_content({"a": random_ids(16), "b": random_ids(13)})),
        9,
    ),
    "llama-csv": ("a.csv", lambda: csv_bytes(random_ids(30), skipped=9), 9),
    "grouped-nf4": ("a.jsonl", nf4_bytes, 64),
    "bigmoe": ("a.csv", lambda: late_turn(bigmoe_bytes()), 5),
}


@pytest.mark.parametrize("kind", MISSING)
def test_every_format_reports_the_tokens_it_lacks(tmp_path: Path, capsys: Any, kind: str) -> None:
    name, make, n_missing = MISSING[kind]
    path = written(tmp_path, name, make())
    options = ImportOptions(model="mixtral-8x7b") if kind == "sglang" else None
    result = import_trace([path], options=options)
    assert result.format == kind
    trace = result.trace.save(tmp_path / "t")
    assert trace.metadata.extra["tokens_not_recorded"] == n_missing
    assert int(trace.requests.context_offset.max()) >= n_missing
    share = f"{n_missing / (n_missing + trace.n_rows):.1%}"
    (warning,) = [w for w in result.warnings if "no recorded routing" in w]
    assert f"({share}, in" in warning
    assert main(["trace", "info", str(tmp_path / "t")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{n_missing} tokens ({share} of all): not replayed" in printed


def test_a_whole_recording_says_that_nothing_is_missing(tmp_path: Path, capsys: Any) -> None:
    path = written(tmp_path, "a.npy", npy_bytes(random_ids(30)))
    out = tmp_path / "t"
    assert main(["trace", "import", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "none known" in printed.out
    assert "no recorded routing" not in printed.err
