"""Request loop, writer and prompts of the recorder, on a model without a network."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import TraceMetadata
from tests.toy_record import PAD_EXPERT, ToyModel, expected_ids
from traces.record.generate import Sampling, answer, route, sample
from traces.record.hooks import Routing, by_weight, find_routing, stack_rows, tap
from traces.record.prompts import Prompt
from traces.record.run import Job, finish, record
from traces.record.writer import Parts, read_facts

GREEDY = Sampling(n_tokens=6, temperature=0)
METADATA = TraceMetadata(model="toy", n_experts=9, top_k=3, id_order="router_rank")


def make_prompts(n: int, *, length: int = 5) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            tokens=rng.integers(32, size=length + i % 3),
            conversation=f"c{i}",
            domain="ab"[i % 2],
            index=i,
        )
        for i in range(n)
    ]


def make_rngs(n: int) -> list[np.random.Generator]:
    return [np.random.default_rng(i) for i in range(n)]


def open_parts(folder: Path, **facts: int) -> Parts:
    return Parts(folder, (2, 3), 9, facts)


def test_every_token_gets_its_row_and_padding_none() -> None:
    model = ToyModel()
    prompts = [np.arange(1, 1 + n) for n in (3, 9, 5)]
    answers = answer(model, prompts, GREEDY, make_rngs(3))
    for prompt, answered in zip(prompts, answers, strict=True):
        assert answered.n_prompt == len(prompt)
        assert len(answered.tokens) == len(prompt) + 6
        assert (answered.expert_ids != PAD_EXPERT).all()
        np.testing.assert_array_equal(answered.expert_ids, expected_ids(model, answered.tokens))
        following = (answered.tokens[len(prompt) - 1 : -1] * 3 + 1) % 32
        np.testing.assert_array_equal(answered.tokens[len(prompt) :], following)


def test_answer_ends_at_a_stop_token_which_has_no_row() -> None:
    model = ToyModel(stop_ids=[13])  # 1 -> 4 -> 13; 2 -> 7 -> 22 -> 3 -> 10 -> 31 -> 30
    short, long = answer(model, [np.array([1]), np.array([2])], GREEDY, make_rngs(2))
    assert short.tokens.tolist() == [1, 4]
    assert long.tokens.tolist() == [2, 7, 22, 3, 10, 31, 30]
    np.testing.assert_array_equal(short.expert_ids, expected_ids(model, short.tokens))


def test_batch_stops_running_once_all_answers_ended() -> None:
    model = ToyModel(stop_ids=[13])
    answer(model, [np.array([1]), np.array([4])], GREEDY, make_rngs(2))
    assert model.n_passes == 2  # prefill, and the 4 of the first


def test_what_a_sequence_says_does_not_depend_on_its_batch() -> None:
    class Flat(ToyModel):
        def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return super()._forward(tokens, positions) * 0

    prompts, drawn = [np.array([1]), np.array([5, 6])], Sampling(n_tokens=5)
    together = answer(Flat(), prompts, drawn, make_rngs(2))
    alone = [
        answer(Flat(), [p], drawn, [rng])[0] for p, rng in zip(prompts, make_rngs(2), strict=True)
    ]
    for one, two in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)


def test_no_hook_is_left_even_after_an_error() -> None:
    model = ToyModel()
    route(model, np.array([1, 2]))
    with pytest.raises(ZeroDivisionError), tap(model.routers, model.read):
        raise ZeroDivisionError
    assert all(not router._forward_hooks for router in model.routers)


def test_router_that_is_not_called_is_an_error() -> None:
    model = ToyModel()
    model.routers.append(model.routers[0].__class__(2, 9, 3))
    model._forward = lambda tokens, positions: torch.zeros(1, 32)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"each of the 3 routers .* got 0 calls: .* kernel"):
        route(model, np.array([1, 2]))


def test_likeliest_token_at_temperature_0_and_cut_at_top_p() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.25, 0.05]))
    rng = np.random.default_rng(0)
    assert sample(logits, Sampling(temperature=0), rng) == 1
    drawn = [sample(logits, Sampling(top_p=0.85), rng) for _ in range(4000)]
    share = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(share, [0, 0.6 / 0.85, 0.25 / 0.85, 0], atol=0.03)


def test_large_vocabulary_is_drawn_from_like_a_small_one() -> None:
    """The shortcut (sort the 4096 likeliest) gives the tokens that sorting all of them gives."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=10_000) * 4)
    p = np.exp(logits.numpy() - logits.numpy().max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order])
    n_kept = int(np.searchsorted(mass, 0.98)) + 1
    assert n_kept < 4096
    for seed in range(50):
        u = np.random.default_rng(seed).random() * mass[n_kept - 1]
        expected = order[np.searchsorted(mass, u, side="right")]
        assert sample(logits, Sampling(), np.random.default_rng(seed)) == expected
    flat = torch.zeros(10_000)
    assert max(sample(flat, Sampling(), np.random.default_rng(s)) for s in range(20)) > 4096


@pytest.mark.parametrize(
    ("field", "value"), [("n_tokens", -1), ("temperature", -0.1), ("top_p", 0.0), ("seed", -1)]
)
def test_sampling_names_what_is_wrong(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        Sampling(**{field: value})


def test_ids_are_found_by_type_and_shape_in_any_place() -> None:
    logits = torch.randn(5, 8)
    gates, ids = logits.topk(2)
    for output in ((logits, gates, ids), (ids, gates), (ids.int(), logits * 0, gates)):
        found = find_routing(output, 2, 8, "r")
        assert isinstance(found, Routing)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.gates, gates)


def test_weights_spread_over_all_experts_are_gathered() -> None:
    """GPT-OSS in transformers v4 returns its weights as ``[T, E]``."""
    gates, ids = torch.rand(5, 8).topk(2)
    scores = torch.zeros(5, 8).scatter(1, ids, gates)
    found = find_routing((scores, ids), 2, 8, "r")
    assert isinstance(found, Routing)
    assert torch.equal(found.gates, gates)


def test_logits_are_found_beside_flat_index_tensors() -> None:
    """GraniteMoE in transformers v4 returns ids sorted by expert and flattened."""
    logits = torch.randn(2, 8)
    output = (torch.arange(4), torch.arange(4), torch.rand(4), [1, 1, 2], logits)
    found = find_routing(output, 2, 8, "r")
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, logits)


def test_unreadable_router_output_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 3 must return expert ids \[tokens, 2\].*\[5, 4\]"):
        find_routing((torch.rand(5, 4),), 2, 8, "layer 3")


def test_by_weight_puts_the_largest_first_and_keeps_ties() -> None:
    ids = torch.tensor([[4, 1, 2, 7]])
    sorted_ids, gates = by_weight(Routing(ids, torch.tensor([[0.1, 0.3, 0.3, 0.2]])))
    assert sorted_ids.tolist() == [[1, 2, 7, 4]]
    torch.testing.assert_close(gates, torch.tensor([[0.3, 0.3, 0.2, 0.1]]))


def test_rows_of_left_padded_sequences() -> None:
    ids = torch.arange(6)[:, None]  # 2 sequences x 3 tokens, K = 1
    rows = stack_rows([Routing(ids, ids * 1.0), Routing(ids + 10, ids * 1.0)], [1, 3], 300)
    assert rows[0].ids.tolist() == [[[2], [12]]]
    assert rows[1].ids[:, 1, 0].tolist() == [13, 14, 15]
    assert rows[0].ids.dtype == np.uint16
    with pytest.raises(ValueError, match=r"2 x 2 tokens in a pass, got 6"):
        stack_rows([Routing(ids, ids * 1.0)], [1, 2], 300)


def test_recording_holds_requests_phases_and_splits(tmp_path: Path) -> None:
    prompts = make_prompts(20)
    model = ToyModel()
    with open_parts(tmp_path / "p") as parts:
        job = Job(prompts=prompts, sampling=GREEDY, batch_size=3, drop_prefix=2, keep_loops=True)
        record(model, job, parts)
        trace = finish(parts, METADATA, tmp_path / "t.safetensors", seed=0)
    requests = trace.requests
    assert requests.n_prompt.tolist() == [len(p.tokens) - 2 for p in prompts]
    assert (requests.n_decode == 6).all()
    assert (requests.context_offset == 2).all()
    assert requests.domain_names() == [p.domain for p in prompts]
    assert np.bincount(requests.split).tolist() == [10, 5, 5]
    first = trace.expert_ids[: requests.length[0]]
    tokens = answer(model, [prompts[0].tokens], GREEDY, make_rngs(1))[0].tokens
    np.testing.assert_array_equal(first, expected_ids(model, tokens)[2:])
    assert trace.gate_weights is not None
    np.testing.assert_allclose(trace.gate_weights[:, :, 0], 0.5)


def test_rows_of_a_looping_answer_are_left_out(tmp_path: Path) -> None:
    """3 t + 1 modulo 32 has period 8 and the places period 8: the answer repeats itself."""
    job = Job(prompts=make_prompts(1), sampling=Sampling(n_tokens=120, temperature=0))
    with open_parts(tmp_path / "p") as parts:
        record(ToyModel(), job, parts)
    (entry,) = parts.entries
    assert entry["n_looped"] > 60
    assert entry["n_rows"] == 5 + 120 - entry["n_looped"]


def test_conversations_that_share_text_become_one(tmp_path: Path) -> None:
    prompts = make_prompts(18, length=70)
    twin = Prompt(tokens=prompts[0].tokens, conversation="twin", domain="a", index=18)
    n_joined = []
    with open_parts(tmp_path / "p") as parts:
        record(ToyModel(), Job(prompts=[*prompts, twin], sampling=GREEDY, batch_size=19), parts)
        for seed in range(6):
            trace = finish(parts, METADATA, tmp_path / "t.safetensors", seed=seed)
            n_joined.append(trace.metadata.extra.get("conversations_joined", 0))
            assert trace.requests.split[0] == trace.requests.split[18]
            assert trace.requests.n_conversations == 19 - n_joined[-1]
    assert set(n_joined) == {0, 1}  # chance may put the two into one split


@pytest.mark.parametrize("batch_size", [1, 2])
def test_interrupted_recording_goes_on_to_the_same_file(tmp_path: Path, batch_size: int) -> None:
    prompts = make_prompts(5)
    job = Job(prompts=prompts, sampling=GREEDY, batch_size=batch_size)
    with open_parts(tmp_path / "whole") as parts:
        record(ToyModel(), job, parts)
        finish(parts, METADATA, tmp_path / "whole.safetensors", seed=0)

    n_passes = 0

    def interrupt(n_rows: int, n_spared: int) -> None:
        nonlocal n_passes
        n_passes += 1
        if n_passes == 20:
            raise KeyboardInterrupt

    with open_parts(tmp_path / "p") as parts, pytest.raises(KeyboardInterrupt):
        record(ToyModel(), job, parts, interrupt)
    n_finished = len(parts.entries)
    assert 0 < n_finished < 5
    with open_parts(tmp_path / "p") as parts:
        cut = finish(parts, METADATA, tmp_path / "cut.safetensors", seed=0)
        assert len(cut.requests) == n_finished
        model = ToyModel()
        record(model, job, parts)
        finish(parts, METADATA, tmp_path / "resumed.safetensors", seed=0)
    assert model.n_passes == -(-(5 - n_finished) // batch_size) * 7
    whole, resumed = (tmp_path / f"{n}.safetensors" for n in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_parts_cut_off_anywhere_still_open(tmp_path: Path) -> None:
    """As after a kill: any tail of any of the files may be missing or half written."""
    with open_parts(tmp_path / "p") as parts:
        record(ToyModel(), Job(prompts=make_prompts(3), sampling=GREEDY), parts)
        whole = parts.trace
        ids = whole(_table(parts), METADATA).expert_ids.copy()
    for name in ("expert_ids.bin", "gate_weights.bin", "requests.jsonl"):
        for share in (0.0, 0.3, 0.5, 0.99):
            folder = tmp_path / f"{name}{share}"
            shutil.copytree(tmp_path / "p", folder)
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: int(share * len(content))])
            with open_parts(folder) as cut:
                assert len(cut.entries) < 3
                n_rows = sum(e["n_rows"] for e in cut.entries)
                record(ToyModel(), Job(prompts=make_prompts(3), sampling=GREEDY), cut)
                again = cut.trace(_table(cut), METADATA).expert_ids
                assert n_rows < len(ids)
                np.testing.assert_array_equal(again, ids)


def test_parts_of_another_recording_are_refused(tmp_path: Path) -> None:
    with open_parts(tmp_path / "p", seed=1) as parts:
        record(ToyModel(), Job(prompts=make_prompts(3), sampling=GREEDY), parts)
    with pytest.raises(ValueError, match=r"seed must be 1 as in the recording .*, got 2"):
        open_parts(tmp_path / "p", seed=2)
    with open_parts(tmp_path / "p", seed=1) as parts, pytest.raises(ValueError, match="1 of 3 fin"):
        record(ToyModel(), Job(prompts=make_prompts(2), sampling=GREEDY), parts)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match=r"must be empty or hold facts\.json"):
        open_parts(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the folder of an interrupted recording"):
        read_facts(tmp_path / "other")


def test_bad_rows_never_reach_the_file(tmp_path: Path) -> None:
    ids = np.tile(np.array([1, 2, 3], dtype=np.uint8), (4, 2, 1))
    gates = np.full((4, 2, 3), 0.3, dtype=np.float16)
    bad = gates.copy()
    bad[2, 1, 0] = np.nan
    with open_parts(tmp_path / "p") as parts:
        with pytest.raises(ValueError, match=r"gate_weights must be finite .* row 2, layer 1"):
            parts.append(ids, bad, {})
        with pytest.raises(ValueError, match=r"rows must be uint8 \[n, L, K\] = \[4, 2, 3\]"):
            parts.append(ids[:, :1], gates, {})
        assert not parts.entries
    assert (tmp_path / "p" / "expert_ids.bin").stat().st_size == 0


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("drop_prefix", 5)])
def test_job_names_what_is_wrong(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        Job(prompts=make_prompts(2), sampling=GREEDY, **{field: value})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    """100,000 tokens of 3 x 16 x 8 bytes = 38 MB of rows; anonymous memory grows by far less."""
    model = ToyModel(n_layers=16, n_experts=60, top_k=8)
    prompts = make_prompts(200, length=496)
    few = Sampling(n_tokens=4, temperature=0)
    job = Job(prompts=prompts, sampling=few, batch_size=4, keep_loops=True)
    resident: list[int] = []
    with Parts(tmp_path / "p", (16, 8), 60, {}) as parts:
        record(model, job, parts, lambda n_rows, n_spared: resident.append(_anonymous_bytes()))
        metadata = TraceMetadata(model="toy", n_experts=60, top_k=8)
        finish(parts, metadata, tmp_path / "t.safetensors", seed=0)
    resident.append(_anonymous_bytes())
    trace = RoutingTrace.open(tmp_path / "t.safetensors")
    assert trace.n_rows >= 100_000
    assert trace.expert_ids.nbytes * 3 > 38e6
    assert max(resident[20:]) - resident[20] < 8e6


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _table(parts: Parts):  # type: ignore[no-untyped-def]
    from ndp_gym.importers.recording import Segment, request_table

    return request_table([Segment(n_rows=e["n_rows"], n_prompt=1) for e in parts.entries], 0)


def test_module_without_hooks_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    with tap([layer], lambda index, output: index) as seen:
        layer(torch.zeros(1, 2))
        layer(torch.zeros(1, 2))
        assert seen == [0, 0]
        seen.clear()
    layer(torch.zeros(1, 2))
    assert not seen
