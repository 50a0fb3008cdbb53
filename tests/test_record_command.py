"""``python -m traces.record`` from prompts to trace file, interrupted, resumed and misused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from ndp_gym.trace import RoutingTrace
from tests.toy_families import family_model
from traces.record import writer
from traces.record.__main__ import main
from traces.record.generate import route
from traces.record.huggingface import HuggingFaceModel
from traces.record.load import Source, load_encoder

TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}answer :"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE with a tokenizer of words and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    family_model("olmoe").save_pretrained(folder)
    words = ["<unk>", "<s>", "user", "answer", ":", "how", "far", "near"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, n: int = 4, **more: Any) -> Path:
    rng = np.random.default_rng(0)
    lines = [{"prompt": rng.integers(2, 63, size=6 + i % 4).tolist(), **more} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def command(model: Path | str, prompts: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--max-new-tokens", "5", "--device", "cpu"]
    return ["--model", str(model), "--prompts", str(prompts), "--out", str(out), *fixed, *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one sentence on stderr of a command that ends with exit code 2."""
    try:
        code: object = main(arguments)
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert code == 2
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


def test_recording_is_a_trace_of_the_model(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 18, domain="numbers")
    out = tmp_path / "t.safetensors"
    more = ("--licence", "MIT", "--keep-loops", "--temperature", "0", "--ignore-eos")
    assert main(command(saved_model, prompts, out, *more)) == 0
    trace = RoutingTrace.open(out)
    trace.verify()
    facts = trace.metadata
    assert (trace.n_layers, trace.n_experts, trace.top_k) == (3, 8, 4)
    assert (facts.licence, facts.id_order, facts.layer_ids) == ("MIT", "router_rank", (0, 1, 2))
    assert facts.extra["architecture"] == "olmoe"
    assert facts.extra["sampling"]["temperature"] == 0
    assert trace.requests.domains == ("numbers",)
    assert (trace.requests.n_decode == 5).all()
    assert np.bincount(trace.requests.split).tolist() == [9, 5, 4]
    first = np.array(json.loads(prompts.read_text().splitlines()[0])["prompt"])
    alone = route(HuggingFaceModel(family_model("olmoe")), first)
    np.testing.assert_array_equal(trace.expert_ids[: len(first)], alone.ids)
    assert not out.with_name("t.safetensors.parts").exists()
    said = capsys.readouterr().out
    assert "Wrote " in said
    assert f"{trace.n_rows} tokens recorded in " in said
    assert main(command(saved_model, prompts, out, *more, "--resume")) == 0
    assert "t.safetensors is complete: 18 requests" in capsys.readouterr().out
    write_prompts(prompts, 3)
    message = refused(capsys, command(saved_model, prompts, out, *more, "--resume"))
    assert "--resume needs" in message


def test_interrupted_command_leaves_a_trace_and_resumes_to_the_same_file(
    saved_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 5)
    whole, out, copy = (tmp_path / f"{name}.safetensors" for name in ("whole", "out", "copy"))
    assert main(command(saved_model, prompts, whole, "--batch-size", "1")) == 0
    append, n_calls = writer.Parts.append, 0

    def interrupt(*arguments: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyboardInterrupt
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Parts, "append", interrupt)
        assert main(command(saved_model, prompts, out, "--batch-size", "1")) == 130
    assert "holds the 2 finished requests; --resume goes on" in capsys.readouterr().err
    assert len(RoutingTrace.open(out).requests) == 2
    rows = RoutingTrace.open(out).expert_ids
    np.testing.assert_array_equal(rows, RoutingTrace.open(whole).expert_ids[: len(rows)])

    parts = out.with_name("out.safetensors.parts")
    parts.rename(copy.with_name("copy.safetensors.parts"))
    assert main(["--out", str(copy), "--assemble"]) == 0
    assert copy.read_bytes() == out.read_bytes()
    copy.with_name("copy.safetensors.parts").rename(parts)

    capsys.readouterr()
    message = refused(capsys, command(saved_model, prompts, out, "--batch-size", "1"))
    assert "holds an interrupted recording: go on with --resume, or remove it" in message
    other = command(saved_model, prompts, out, "--resume", "--temperature", "0")
    assert "metadata.extra.sampling.temperature must be 1.0" in refused(capsys, other)
    assert main(command(saved_model, prompts, out, "--batch-size", "1", "--resume")) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_texts_and_messages_are_encoded_by_the_tokenizer(saved_model: Path, tmp_path: Path) -> None:
    encode = load_encoder(Source(model=str(saved_model)))
    assert list(encode("how far")) == [5, 6]
    assert list(encode([{"role": "user", "content": "how near"}])) == [2, 4, 5, 7, 3, 4]
    prompts, out = tmp_path / "p.jsonl", tmp_path / "t.safetensors"
    lines = [
        {"prompt": "how far", "conversation": "c", "domain": "a"},
        {"messages": [{"role": "user", "content": "how near"}], "conversation": "c"},
        {"prompt": [5, 6, 7], "conversation": 7, "domain": "a"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    assert main(command(saved_model, prompts, out)) == 0
    requests = RoutingTrace.open(out).requests
    assert requests.n_prompt.tolist() == [2, 6, 3]
    assert requests.conversation.tolist() == [0, 0, 1]
    assert requests.domain_names() == ["a", "unknown", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: must be an object with prompt or messages"),
        ('{"prompt": "a", "text": 1}', "got ['text']"),
        ("{}", "must hold prompt or messages, one of the two"),
        ('{"prompt": 3}', "prompt must be a text or a list of token ids, got 3"),
        ('{"prompt": [1, "a"]}', "prompt must be a text or a list of token ids"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list of objects"),
        ('{"prompt": [1], "domain": 2}', "domain must be a text, got 2"),
        ('{"prompt": [1], "conversation": null}', "conversation must be a text or a number"),
        ('{"prompt": []}', "line 1: prompt must have at least one token"),
        ('{"prompt": [64]}', "line 1: tokens must be in 0..63, got 64"),
        (json.dumps({"prompt": [5] * 252}), "at most 256 tokens together, got 252 + 5"),
        ("", "must hold at least one prompt"),
    ],
)
def test_malformed_prompts_are_one_sentence(
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    message: str,
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(line)
    assert message in refused(capsys, command(saved_model, prompts, tmp_path / "t.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_template_in_front_of_all_prompts_is_found_before_recording(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "t.safetensors"
    template = np.random.default_rng(0).integers(2, 63, size=70).tolist()
    lines = [{"prompt": [*template, 2 + i, 3, 4]} for i in range(16)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    message = refused(capsys, command(saved_model, prompts, out))
    assert "prompts 1 and 2 share their first 70 tokens but not their conversation" in message
    assert main(command(saved_model, prompts, out, "--drop-prefix", "70")) == 0
    requests = RoutingTrace.open(out).requests
    assert (requests.context_offset == 70).all()
    assert (requests.n_prompt == 3).all()


def test_models_that_cannot_be_recorded_are_one_sentence(
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "t.safetensors"
    missing = refused(capsys, command(tmp_path / "none", prompts, out))
    assert f"cannot open model {tmp_path / 'none'} (no folder of that name either)" in missing
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "novel_moe"}')
    assert "novel_moe" in refused(capsys, command(unknown, prompts, out))
    dense = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "dense")
    message = refused(capsys, command(tmp_path / "dense", prompts, out))
    assert "llama has no mixture-of-experts layers" in message
    fits = refused(capsys, command(saved_model, prompts, out, "--preset", "olmoe-1b-7b"))
    assert "olmoe-1b-7b has 16 routed layers and top_k 8, got 3 and 4" in fits
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        absent = refused(capsys, command(saved_model, prompts, out))
    assert "recording needs transformers, which is an extra: pip install" in absent
    assert not out.exists()
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "t.safetensors"], "--model and --prompts must be given"),
        (["--out", "no/such/folder/t"], "--out must be a file in a folder that exists"),
        (["--out", "t", "--assemble"], "t.parts is not the folder of an interrupted recording"),
        (["--model", "m"], "the following arguments are required: --out"),
        (["--model", "m", "--prompts", "none.jsonl", "--out", "t"], "No such file or directory"),
    ],
)
def test_bad_arguments_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, arguments)
