"""Damaged input of every format ends in one clear error or in a valid result, whatever was damaged.

Every case is mutated with a fixed seed: some hundred times always, some thousand times among the
slow tests. No mutation may hang, crash or need memory beyond a small multiple of its file.
"""

import gzip
import json
import re
import signal
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ndp_gym.importers import FORMATS, ImportOptions, import_trace
from ndp_gym.importers.popularity import load_profile
from ndp_gym.plan_export import read_plan
from ndp_gym.plan_targets import TARGETS
from ndp_gym.trace import RoutingTrace
from tests import test_engine_importers as engines
from tests import test_importers as formats
from tests import test_popularity as counts
from tests.conftest import make_trace
from tests.test_plan_export import MIXED
from tests.toy import MODEL

FEW, MANY = 100, 2000
HANG_S = 120
FREE_BYTES, BYTES_PER_BYTE = 4 * 2**20, 100  # of memory; a parsed "[]," alone is 64 bytes
MAX_MESSAGE = 700
EXTREMES = (
    b"-1", b"0", b"255", b"65535", b"65536", b"2147483647", b"2147483648", b"1048576", b"1e308",
    b"9" * 30, b"9" * 5000, b"null", b"true", b"NaN", b'"7"', b"[]", b"{}", b"[1]", b"0.5", b"-0",
    b'"' + b"x" * 5000 + b'"', b"[" * 500 + b"]" * 500, b"",
)  # fmt: skip
FIELDS = [
    struct.pack("<Q", n) for n in (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
]


class Case(NamedTuple):
    """A valid file, and what reads it: it must raise ``ValueError`` or check what it read."""

    name: str
    make: Callable[[], bytes]
    read: Callable[[Path], object]


def read_recording(path: Path) -> None:
    check(import_trace([path], options=ImportOptions(top_k=2)).trace)


def read_trace(path: Path) -> None:
    trace = RoutingTrace.open(path)
    trace.verify()
    check(trace)


def check(trace: RoutingTrace) -> None:
    ids = np.sort(trace.expert_ids.astype(np.int64), axis=2)
    assert ids.size
    assert 0 <= ids.min() <= ids.max() < trace.n_experts
    assert (np.diff(ids, axis=2) > 0).all()
    assert int(trace.requests.length.sum()) <= trace.n_rows
    assert (trace.requests.n_prompt <= trace.requests.length).all()
    if trace.gate_weights is not None:
        assert np.isfinite(trace.gate_weights).all()


def read_profile(path: Path) -> None:
    load = load_profile(path, MODEL).load
    assert load.shape == (MODEL.n_layers, MODEL.n_experts)
    assert load.min() >= 0
    np.testing.assert_allclose(load.sum(axis=1), MODEL.top_k)


def small_hdmoe() -> bytes:
    """One layer, one conversation; only the first row of a request has the experts 6 and 7."""
    turn = formats.random_ids(530, 1, n_experts=6)
    turn[0] = [6, 7]
    ids = np.concatenate([turn, turn, formats.random_ids(3, 1, n_experts=6)])
    return json.dumps({"0": ids[:, 0].tolist()}).encode()


def saved_vllm() -> bytes:
    """Two requests of the first generation, a line each."""
    rows = []
    for _ in range(2):
        ids = formats.random_ids(9).tolist()
        outputs = [{"routed_experts": ids[4:]}]
        rows.append({"usage": {"prompt_tokens": 4}, "prompt_routed_experts": ids[:4]})
        rows[-1]["outputs"] = outputs
    return "\n".join(map(json.dumps, rows)).encode()


def trace_bytes() -> bytes:
    trace = make_trace(n_conversations=3)
    path = Path(TMP[0]) / "whole"
    trace.save(path)
    return path.read_bytes()


def recorder_bytes() -> bytes:
    return engines.torch_bytes(engines.recorder_content(engines.two_requests()))


TMP: list[str] = []
RECORDINGS = {
    "nvmoe": Case("a.jsonl", lambda: formats.nvmoe_bytes(formats.random_ids(12)), read_recording),
    "hdmoe": Case("experts_math_mixtral.json", small_hdmoe, read_recording),
    "bigmoe": Case("a.csv", lambda: formats.bigmoe_bytes(2, 2), read_recording),
    "routertrace": Case("a.json", formats.routertrace_bytes, read_recording),
    "grouped-nf4": Case("a.jsonl", lambda: formats.nf4_bytes(30), read_recording),
    "megatron": Case(
        "a.jsonl",
        lambda: "\n".join(engines.megatron_lines([*np.split(formats.random_ids(12), 3)])).encode(),
        read_recording,
    ),
    "llama-csv": Case("a.csv", lambda: engines.csv_bytes(formats.random_ids(12)), read_recording),
    "sglang": Case(
        "a.json",
        lambda: json.dumps(engines.sglang_response(formats.random_ids(12), 4)).encode(),
        read_recording,
    ),
    "sglang-recorder": Case("a.pt", recorder_bytes, read_recording),
    "vllm": Case("a.json", formats.vllm_bytes, read_recording),
}
OTHERS = {
    "vllm saved": Case("a.jsonl", saved_vllm, read_recording),
    "vllm npy": Case(
        "a.npy",
        lambda: formats.npy_bytes(formats.random_ids(12).astype(np.uint8)),
        read_recording,
    ),
    "trace file": Case("a.safetensors", trace_bytes, read_trace),
    "imatrix": Case("a.gguf", counts.imatrix_bytes, read_profile),
    "counts pt": Case("a.pt", counts.stat_bytes, read_profile),
    "counts per pass": Case("a.pt", counts.per_pass_bytes, read_profile),
    "counts json": Case("a.json", counts.json_bytes, read_profile),
    "counts npy": Case("a.npy", lambda: formats.npy_bytes(counts.COUNTS), read_profile),
    "plan": Case("a.json", lambda: bytes(str(TARGETS["json"].write(MIXED)[0]), "utf8"), read_plan),
}
CASES = RECORDINGS | OTHERS


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The data after one or a few random changes; ``other`` is a file of another format."""
    for _ in range(1 + int(rng.integers(3)) // 2):
        data = _changed(data, other, rng) or b"\0"
    return data


def _changed(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
    match int(rng.integers(9)):
        case 0:
            return data[:at]
        case 1:
            noise = bytes(rng.integers(0, 256, length % 4 + 1).tolist())
            return data[:at] + noise + data[at + len(noise) :]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[: at + length] + data[at : at + length] * int(rng.integers(1, 20))
        case 4:
            field = FIELDS[rng.integers(len(FIELDS))][: int(rng.choice([1, 2, 4, 8]))]
            return data[:at] + field + data[at + len(field) :]
        case 5:
            start = int(rng.integers(len(other)))
            return data[:at] + other[start : start + length] + data[at:]
        case 6:
            lines = data.splitlines(keepends=True)
            first, second = rng.integers(len(lines), size=2)
            lines[first], lines[second] = lines[second], lines[first]
            return b"".join(lines)
        case _:  # a number of the text becomes another value
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[at : at + 400]))
            if not numbers:
                return data[:at] + EXTREMES[rng.integers(len(EXTREMES))] + data[at:]
            found = numbers[rng.integers(len(numbers))]
            value = EXTREMES[rng.integers(len(EXTREMES))]
            if rng.random() < 0.5:
                value = str(rng.integers(0, 10)).encode()
            return data[: at + found.start()] + value + data[at + found.end() :]


@contextmanager
def no_hang() -> Iterator[None]:
    """Ends what does not come back."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still reading after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survive(kind: str, n: int, folder: Path, *, weigh_every: int) -> tuple[int, int]:
    """Mutate a case ``n`` times, weighing some; how many were refused and how many read."""
    TMP[:] = [str(folder)]
    case = CASES[kind]
    rng = np.random.default_rng(len(kind) + n)
    data, other = case.make(), (formats.vllm_bytes() if kind == "nvmoe" else b'{"a": [1, 2]}\n' * 9)
    path = folder / case.name
    path.write_bytes(data)
    case.read(path)  # also compiles what is compiled, before memory is counted
    n_refused = 0
    for index in range(n):
        broken = mutated(data, other, rng)
        if rng.random() < 0.05:  # packed, then damaged, or the other way round
            packed = gzip.compress(broken, 1)
            broken = _changed(packed, other, rng) or packed if rng.random() < 0.5 else packed
        path.write_bytes(broken)
        with weighed(len(broken)) if index % weigh_every == 0 else nullcontext(), no_hang():
            n_refused += is_refused(case, path)
    return n_refused, n - n_refused


@contextmanager
def weighed(size: int) -> Iterator[None]:
    """Compares the memory that reading a file of ``size`` bytes took with what it may take."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= FREE_BYTES + BYTES_PER_BYTE * size, f"{peak} bytes for a file of {size}"


def is_refused(case: Case, path: Path) -> bool:
    """Whether the file is refused, in one clear sentence and without a warning."""
    message = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            case.read(path)
        except ValueError as error:
            message = str(error)
    assert not said, said[0]
    if message is not None:
        assert path.name.split(".")[0] in message
        assert "\n" not in message
        assert len(message) < MAX_MESSAGE
    return message is not None


def test_every_format_is_fuzzed() -> None:
    assert set(RECORDINGS) == set(FORMATS)


@pytest.mark.parametrize("kind", CASES)
def test_damaged_files_end_in_one_error_or_a_valid_result(tmp_path: Path, kind: str) -> None:
    n_refused, n_read = survive(kind, FEW, tmp_path, weigh_every=2)
    assert n_refused > FEW // 4
    assert n_read < FEW


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_thousands_of_damaged_files_do_so_too(
    tmp_path: Path, kind: str, record_property: Callable[[str, Any], None]
) -> None:
    n_refused, n_read = survive(kind, MANY, tmp_path, weigh_every=20)
    record_property("refused", n_refused)
    record_property("read", n_read)
    assert n_refused > MANY // 4
