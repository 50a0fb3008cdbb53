"""`ndp-gym quality measure`: every layout of a checkpoint, interruptions, memory and errors."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym import cli
from ndp_gym.quality_file import QualityFile
from ndp_gym.quality_measure import BITS, measure
from ndp_gym.quantizers import quantize, relative_error

ROOT = Path(__file__).resolve().parent.parent
N_LAYERS, N_EXPERTS, HIDDEN, INNER = 2, 3, 24, 10
Expert = tuple[np.ndarray, np.ndarray, np.ndarray]
Experts = dict[tuple[int, int], Expert]
Tensors = dict[str, tuple[str, np.ndarray]]


def write(path: Path, tensors: Tensors) -> None:
    """A safetensors file, written by hand so that bf16 and other types can be in it."""
    header, content = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = array.astype("<f4").view("<u4") >> 16 if dtype == "BF16" else array
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}.get(dtype, "u1")
        data = raw.astype(kind).tobytes()
        span = [len(content), len(content) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        content += data
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.fixture(scope="module")
def experts() -> Experts:
    """Gate, up [I, H] and down [H, I] of every expert, with 7 bits of mantissa: exact in bf16."""
    rng = np.random.default_rng(5)

    def matrix(*shape: int) -> np.ndarray:
        values = np.ldexp(rng.integers(64, 128, shape) / 64, rng.integers(-4, 1, shape))
        return (values * rng.choice([-1, 1], shape)).astype(np.float32)

    return {
        (layer, expert): (matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER))
        for layer in range(N_LAYERS)
        for expert in range(N_EXPERTS)
    }


def mixtral(experts: Experts, dtype: str = "BF16") -> Tensors:
    found: Tensors = {"model.embed_tokens.weight": (dtype, np.ones((4, 4)))}
    for (layer, expert), matrices in experts.items():
        stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for name, matrix in zip(("w1", "w3", "w2"), matrices, strict=True):
            found[f"{stem}.{name}.weight"] = (dtype, matrix)
    return found


def deepseek(experts: Experts) -> Tensors:
    """A dense layer 0, shared experts, routed layers from 1, and a prediction layer at the end."""
    found: Tensors = {"model.layers.0.mlp.gate_proj.weight": ("F16", np.ones((4, 4)))}
    names = ("gate_proj", "up_proj", "down_proj")
    for (layer, expert), matrices in experts.items():
        for name, matrix in zip(names, matrices, strict=True):
            stem = f"model.layers.{layer + 1}.mlp"
            found[f"{stem}.experts.{expert}.{name}.weight"] = ("F16", matrix)
            found[f"{stem}.shared_experts.{name}.weight"] = ("F16", matrix)
    for name in names:
        found[f"model.layers.{N_LAYERS + 1}.mlp.experts.0.{name}.weight"] = ("F16", np.ones((2, 2)))
        found[f"mtp.layers.1.mlp.experts.0.{name}.weight"] = ("F16", np.ones((2, 2)))
    return found


def fused(experts: Experts, layout: str) -> Tensors:
    found: Tensors = {}
    for layer in range(N_LAYERS):
        gate, up, down = (
            np.stack([experts[layer, expert][i] for expert in range(N_EXPERTS)]) for i in range(3)
        )
        both = np.concatenate([gate, up], axis=1)  # [E, 2 I, H]
        stem = f"model.layers.{layer}.mlp.experts"
        if layout == "transformers5":
            found |= {f"{stem}.gate_up_proj": ("F32", both), f"{stem}.down_proj": ("F32", down)}
        elif layout == "gpt_oss":
            alternating = np.stack([gate, up], axis=2).reshape(both.shape)
            found[f"{stem}.gate_up_proj"] = ("BF16", alternating.transpose(0, 2, 1))
            found[f"{stem}.gate_up_proj_bias"] = ("BF16", np.ones((N_EXPERTS, 2 * INNER)))
            found[f"{stem}.down_proj"] = ("BF16", down.transpose(0, 2, 1))
            found[f"{stem}.down_proj_bias"] = ("BF16", np.ones((N_EXPERTS, HIDDEN)))
        else:  # the bundled small model
            found[f"layers.{layer}.experts.w_in"] = ("F16", both.transpose(0, 2, 1))
            found[f"layers.{layer}.experts.w_out"] = ("F16", down.transpose(0, 2, 1))
    return found


def expected(experts: Experts, bits: tuple[int, ...] = BITS, group: int = 128) -> np.ndarray:
    """[L, E, NB], from dequantized matrices."""
    errors = np.zeros((N_LAYERS, N_EXPERTS, len(bits)))
    for key, matrices in experts.items():
        for i, b in enumerate(bits):
            losses = [((quantize(m, b, group) - m) ** 2).sum() / (m**2).sum() for m in matrices]
            errors[(*key, i)] = np.mean(losses)
    return errors


def write_sharded(folder: Path, tensors: Tensors) -> None:
    """Two files with an index, every second tensor in each, and a config."""
    names, files = (
        list(tensors),
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    )
    for start, file in enumerate(files):
        write(folder / file, {name: tensors[name] for name in names[start::2]})
    mapped = {name: files[i % 2] for i, name in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": N_LAYERS + 1}))


@pytest.mark.parametrize("layout", ["BF16", "F16", "F32", "transformers5", "gpt_oss", "minimoe"])
def test_every_layout_of_one_file_gives_the_same_errors(
    tmp_path: Path, experts: Experts, layout: str
) -> None:
    is_single = layout in ("BF16", "F16", "F32")
    weights = tmp_path / "tiny.safetensors"
    write(weights, mixtral(experts, layout) if is_single else fused(experts, layout))
    found = measure(weights, tmp_path / "q")
    np.testing.assert_allclose(found.relative_error, expected(experts), rtol=1e-4, atol=1e-9)
    assert (found.bits, found.group, found.model) == (BITS, 128, "tiny")
    assert found.layers == (0, 1)
    # rows of 24 and of 10 weights: each one group; two of three matrices have rows of 24
    mean_parameters = (2 / 24 + 1 / 10) / 3
    stored = [b + (16 if b == 1 else 32) * mean_parameters for b in BITS]
    np.testing.assert_allclose(found.stored_bits, stored)


def test_a_sharded_folder_with_other_layers_and_experts(tmp_path: Path, experts: Experts) -> None:
    write_sharded(tmp_path, deepseek(experts))
    found = measure(tmp_path, tmp_path / "q", bits=(2, 4), group=8, name="deep", shape=(2, 3))
    np.testing.assert_allclose(
        found.relative_error, expected(experts, (4, 2), 8), rtol=1e-4, atol=1e-9
    )
    assert (found.layers, found.bits, found.model) == ((1, 2), (4, 2), "deep")
    files = [source["file"] for source in found.sources]
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert QualityFile.open(tmp_path / "q").sources == found.sources
    by_index = measure(
        tmp_path / "model.safetensors.index.json", tmp_path / "r", bits=(2, 4), group=8
    )
    assert np.array_equal(by_index.relative_error, found.relative_error)


@pytest.mark.parametrize("depth", [{"text_config": {"num_hidden_layers": 1}}, {}])
def test_the_depth_may_stand_with_the_text_part(
    tmp_path: Path, experts: Experts, depth: dict[str, Any]
) -> None:
    write(tmp_path / "model.safetensors", mixtral(experts))
    (tmp_path / "config.json").write_text(json.dumps(depth))
    found = measure(tmp_path, tmp_path / "q", bits=(1,))
    assert found.layers == ((0,) if depth else (0, 1))


def test_a_folder_without_an_index(tmp_path: Path, experts: Experts) -> None:
    write(tmp_path / "model.safetensors", mixtral(experts))
    found = measure(tmp_path, tmp_path / "out" / "q", bits=(1,))
    np.testing.assert_allclose(found.relative_error, expected(experts, (1,)), rtol=1e-5)


def test_an_expert_is_the_mean_of_its_matrices(tmp_path: Path) -> None:
    gate = np.array([[-3.0, 1.0, 1.0, -1.0]])  # signs times 1.5 lose 3 of 12
    up = np.array([[2.0, -2.0, 2.0, 2.0]])  # exact
    down = np.array([[1.0], [2.0], [3.0], [4.0]])  # rows of one weight: exact
    write(tmp_path / "w.safetensors", mixtral({(0, 0): (gate, up, down)}, "F32"))
    found = measure(tmp_path / "w.safetensors", tmp_path / "q", bits=(1,))
    assert found.relative_error.tolist() == [[[pytest.approx(0.25 / 3)]]]


class StoppedError(Exception):
    """Stands for the user's interrupt."""


def stop_after(n: int) -> Any:
    def progress(done: int, total: int) -> None:
        assert total == N_LAYERS * N_EXPERTS
        if done == n:
            raise StoppedError

    return progress


@pytest.mark.parametrize("torn", [b"", b"[[0.25, 0.1"])
def test_an_interrupted_measurement_goes_on(tmp_path: Path, experts: Experts, torn: bytes) -> None:
    weights, out, part = tmp_path / "w", tmp_path / "q", tmp_path / "q.part"
    write(weights, mixtral(experts))
    measure(weights, tmp_path / "whole")
    with pytest.raises(StoppedError):
        measure(weights, out, progress=stop_after(N_EXPERTS + 2))
    assert not out.exists()
    part.write_bytes(part.read_bytes() + torn)
    calls: list[int] = []
    measure(weights, out, progress=lambda done, _: calls.append(done))
    assert calls == [N_EXPERTS + 1, N_EXPERTS + 2, N_EXPERTS + 3]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not part.exists()


def test_a_part_of_another_measurement_is_not_mixed_in(tmp_path: Path, experts: Experts) -> None:
    weights, out = tmp_path / "w", tmp_path / "q"
    write(weights, mixtral(experts))
    with pytest.raises(StoppedError):
        measure(weights, out, progress=stop_after(N_EXPERTS + 1))
    with pytest.raises(ValueError, match=r"q.part: is of other weights, bits or group"):
        measure(weights, out, bits=(2,))
    changed = {key: (gate * 2, up, down) for key, (gate, up, down) in experts.items()}
    write(weights, mixtral(changed))
    with pytest.raises(ValueError, match=r"q.part: is of other weights"):
        measure(weights, out)


def test_threads_change_no_byte(tmp_path: Path, experts: Experts) -> None:
    write(tmp_path / "w", mixtral(experts))
    for threads in (1, 3):
        measure(tmp_path / "w", tmp_path / f"q{threads}", threads=threads)
    assert (tmp_path / "q1").read_bytes() == (tmp_path / "q3").read_bytes()


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss"])
def test_memory_is_that_of_one_tensor_slice(tmp_path: Path, layout: str) -> None:
    inner, hidden, n_experts = 256, 512, 16
    weights, matrix = tmp_path / "w", np.ones((inner, hidden))
    if layout == "mixtral":
        write(weights, mixtral({(0, e): (matrix, matrix, matrix.T) for e in range(n_experts)}))
        largest = 4 * matrix.size
    else:
        stem = "layers.0.mlp.experts"
        both = np.ones((n_experts, hidden, 2 * inner))
        down = np.ones((n_experts, inner, hidden))
        write(
            weights, {f"{stem}.gate_up_proj": ("BF16", both), f"{stem}.down_proj": ("BF16", down)}
        )
        largest = 8 * matrix.size
    measure(weights, tmp_path / "warm", bits=(2, 1))  # compiles
    tracemalloc.start()
    try:
        measure(weights, tmp_path / "q", bits=(2, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = 4.5 * largest  # of single-precision slices, blocks included
    assert peak < limit < weights.stat().st_size


def broken(experts: Experts, how: str) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """The tensors of `mixtral` with one thing wrong."""
    target = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for name, (dtype, array) in mixtral(experts).items():
        if name != target:
            yield name, (dtype, array)
        elif how == "nan":
            yield name, (dtype, np.where(array == array.max(), np.nan, array))
        elif how == "fp8":
            yield name, ("F8_E4M3", array)
        elif how == "vector":
            yield name, (dtype, array[0])
        elif how == "double":
            yield name, (dtype, array)
            yield name.replace("w3", "up_proj"), (dtype, array)
        elif how == "two ways":
            yield name, (dtype, array)
            yield "layers.0.mlp.experts.down_proj", (dtype, array[None])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"experts.2.w3.weight: weight must be finite, got nan or infinity"),
        ("fp8", r"experts.2.w3.weight must be one of BF16, F16, F32, got F8_E4M3"),
        ("vector", r"experts.2.w3.weight must be a matrix, got \[24\]"),
        ("missing", r"layer 1 lacks the up matrix of expert 2 \(of 3\)"),
        ("double", r"up_proj.weight and .*w3.weight are the same expert"),
        ("two ways", r"experts are stored in two ways"),
    ],
)
def test_broken_experts_are_named(tmp_path: Path, experts: Experts, how: str, message: str) -> None:
    write(tmp_path / "w", dict(broken(experts, how)))
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / "w", tmp_path / "q", bits=(1,))
    assert not (tmp_path / "q").exists()


def test_broken_fused_experts_are_named(tmp_path: Path, experts: Experts) -> None:
    weights, tensors = tmp_path / "w", fused(experts, "transformers5")
    name = "model.layers.1.mlp.experts.down_proj"
    good = tensors.pop(name)
    write(weights, tensors)
    with pytest.raises(ValueError, match=r"layer 1 lacks experts.down_proj"):
        measure(weights, tmp_path / "q")
    write(weights, {**tensors, name: ("F32", good[1][:, :, 1:])})
    with pytest.raises(ValueError, match=r"\[3, 20, 24\] and .*\[3, 24, 9\] must be \[E, 2 I, H\]"):
        measure(weights, tmp_path / "q")
    fewer = {n: (dtype, a[:2] if ".1." in n else a) for n, (dtype, a) in tensors.items()}
    write(weights, {**fewer, name: ("F32", good[1][:2])})
    with pytest.raises(ValueError, match=r"layers differ in experts: \[2, 3\]"):
        measure(weights, tmp_path / "q")


def test_files_without_experts_or_damaged_are_named(tmp_path: Path, experts: Experts) -> None:
    weights, out = tmp_path / "w", tmp_path / "q"
    write(weights, {"model.layers.0.mlp.experts.down_proj_blocks": ("U8", np.ones((2, 2)))})
    with pytest.raises(ValueError, match=r"no experts among 1 tensors.*down_proj_blocks"):
        measure(weights, out)
    write(weights, mixtral(experts))
    content = weights.read_bytes()
    for damaged, message in (
        (content[:-1], r"w: truncated: .*w2.weight ends at byte"),
        (b"tiny", "w: not a safetensors file"),
        (struct.pack("<Q", 9) + b"not json!", "w: header: not valid JSON"),
        (content.replace(b"[24, 10]", b"[24, 11]"), r"480 bytes cannot be BF16 \[24, 11\]"),
        (content.replace(b'"dtype"', b'"dtipe"'), "dtype, shape or data_offsets are damaged"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            measure(weights, out)
    with pytest.raises(FileNotFoundError):
        measure(tmp_path / "absent", out)


def test_incomplete_folders_are_named(tmp_path: Path, experts: Experts) -> None:
    folder, out = tmp_path / "model", tmp_path / "q"
    folder.mkdir()
    with pytest.raises(ValueError, match="model: holds no safetensors file"):
        measure(folder, out)
    write_sharded(folder, deepseek(experts))
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files of .* are missing: model-00002-of-00002"):
        measure(folder, out)
    write(second, {"other": ("F16", np.ones(2))})
    with pytest.raises(
        ValueError, match=r"names .* in model-00002-of-00002.safetensors, which lac"
    ):
        measure(folder, out)
    second.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(ValueError, match=r"the file of a must be a plain name, got '../b'"):
        measure(folder, out)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: must be a JSON object"):
        measure(second, out)
    index.write_text("{}")
    with pytest.raises(ValueError, match="must hold a weight_map"):
        measure(folder, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (16, 4)}, "bits must be in 1..8, got 16, 4"),
        ({"bits": ()}, "bits must be in 1..8, got none"),
        ({"group": 0}, "group and threads must be >= 1, got 0 and 1"),
        ({"threads": 0}, "group and threads must be >= 1, got 128 and 0"),
        ({"shape": (32, 8)}, r"w: must have 32 routed layers x 8 experts, got 2 x 3"),
    ],
)
def test_options_out_of_range_are_named(
    tmp_path: Path, experts: Experts, options: dict[str, Any], message: str
) -> None:
    write(tmp_path / "w", mixtral(experts))
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / "w", tmp_path / "q", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_commands_measure_and_show(
    tmp_path: Path, experts: Experts, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tmp_path / "tiny.safetensors", tmp_path / "q.safetensors"
    write(weights, mixtral(experts))
    command = ["quality", "measure", "--weights", str(weights), "--out", str(out)]
    assert cli.main([*command, "--bits", "4,1", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "tiny: 2 layers x 3 experts" in text
    assert f"wrote {out}" in text
    mean = expected(experts, (4, 1)).mean(axis=(0, 1))
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["mean"])
    assert [float(figure) for figure in row[1:]] == pytest.approx(mean, rel=0.01)
    assert cli.main(["quality", "info", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == text.splitlines()[:-1]
    assert cli.main([*command, "--model", "mixtral-8x7b"]) == 2
    error = capsys.readouterr().err
    assert "must have 32 routed layers x 8 experts, got 2 x 3" in error
    assert cli.main([*command, "--bits", "four"]) == 2
    assert "--bits must be numbers such as 4,3,2, got 'four'" in capsys.readouterr().err


def test_the_bundled_weights_measure_as_they_are(tmp_path: Path) -> None:
    weights = ROOT / "traces" / "minimoe_weights.safetensors"
    found = measure(weights, tmp_path / "q", bits=(1,))
    assert found.relative_error.shape == (8, 64, 1)
    from safetensors import safe_open

    with safe_open(str(weights), framework="numpy") as file:
        w_in = file.get_slice("layers.5.experts.w_in")[7]
        w_out = file.get_slice("layers.5.experts.w_out")[7]
    gate, up = np.split(w_in.T, 2)
    errors = [relative_error(matrix, 1) for matrix in (gate, up, w_out.T)]
    assert found.relative_error[5, 7, 0] == pytest.approx(np.mean(errors), rel=1e-6)
