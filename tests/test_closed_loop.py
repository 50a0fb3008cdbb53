"""The quantized bundled model: its copies, its losses, and routing that answers to the bits."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ndp_gym.quantizers import quantize, relative_error
from ndp_gym.rollout import Task
from ndp_gym.specs import MoESpec
from traces.minimoe import weights
from traces.minimoe.experts import Experts
from traces.minimoe.model import Config, MiniMoE
from train.closed_loop import agreement, bitmaps, loop, maps, summary
from train.closed_loop.__main__ import WEIGHTS, bundled_task
from train.closed_loop.cache import Cache
from train.closed_loop.closed import Loop, Speed
from train.closed_loop.copies import FULL, WIDTHS, Copies, loss
from train.closed_loop.decode import Decoder
from train.closed_loop.few_tokens import mix
from train.closed_loop.tokens import TokenReader

MAPS_CSV = Path(__file__).resolve().parent.parent / "docs/quality_maps.csv"
SMALL = Config(
    vocabulary_size=32, hidden_size=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, expert_size=6
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bundled() -> Copies:
    return Copies(weights.load(WEIGHTS).model)


@pytest.fixture(scope="module")
def task() -> Task:
    """Request 0 alone, whose tokens the recording names."""
    return replace(bundled_task(), batch_size=1, max_windows=2)


@pytest.fixture(scope="module")
def texts(task: Task) -> dict[int, NDArray[np.int64]]:
    return {0: np.array(task.trace.metadata.extra["tokens_of_request_0"])}


def small_model() -> MiniMoE:
    torch.manual_seed(0)
    return MiniMoE(SMALL).eval()


def test_tokens_are_read_back_from_routing(
    bundled: Copies, task: Task, texts: dict[int, NDArray[np.int64]]
) -> None:
    ids, gates = task.trace.window(0, 60)
    assert gates is not None
    read = TokenReader(bundled.model).read(ids[:, 0], gates[:, 0])
    assert read.tolist() == texts[0][:60].tolist()


def test_rows_that_no_token_explains_are_refused(bundled: Copies, task: Task) -> None:
    ids, gates = task.trace.window(0, 3)
    assert gates is not None
    with pytest.raises(ValueError, match="no token routes as row 1 does"):
        TokenReader(bundled.model).read(ids[:, 0], gates[[0, 2, 1], 0])


def test_each_expert_gets_its_own_width_and_full_width_is_the_original() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = Copies(model)
    bits = np.array([[16, 3, 1, 8], [2, 16, 4, 4]], np.uint8)
    copies.serve(bits)
    for layer in range(2):
        for expert in range(4):
            for name in ("w_in", "w_out"):
                exact = before[f"layers.{layer}.experts.{name}"][expert].T.numpy()
                width = int(bits[layer, expert])
                wanted = exact if width == FULL else quantize(exact, width)
                served = model.state_dict()[f"layers.{layer}.experts.{name}"][expert].T.numpy()
                np.testing.assert_array_equal(served, wanted)
    copies.serve(np.full((2, 4), 16, np.uint8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_noise_has_the_size_asked_for_and_is_taken_away() -> None:
    model = small_model()
    before = [layer.experts.w_in.detach().clone() for layer in model.layers]
    copies = Copies(model)
    copies.add_noise(1, 0.1, seed=0)
    difference = [
        float((layer.experts.w_in.detach() - w).square().sum() / w.square().sum())
        for layer, w in zip(model.layers, before, strict=True)
    ]
    assert difference == [0.0, pytest.approx(0.1, rel=0.2)]
    copies.clean()
    assert torch.equal(model.layers[1].experts.w_in, before[1])


def test_measured_errors_are_those_of_the_weights() -> None:
    model = small_model()
    w_in, w_out = (
        w.detach() for w in (model.layers[0].experts.w_in, model.layers[0].experts.w_out)
    )
    errors = Copies(model).relative_error
    lost = sum(
        relative_error(w[2].T.numpy(), 2) * float(w[2].square().sum()) for w in (w_in, w_out)
    )
    total = sum(float(w[2].square().sum()) for w in (w_in, w_out))
    assert errors[0, 2, WIDTHS.index(2)] == pytest.approx(lost / total, rel=1e-4)
    assert not errors[..., WIDTHS.index(FULL)].any()


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be \[L, E\]"):
        Copies(small_model()).serve(np.full((2, 4), 5, np.uint8))


def test_loss_of_padded_texts_is_that_of_each_alone() -> None:
    model, rng = small_model(), np.random.default_rng(0)
    batch = [rng.integers(0, 32, n) for n in (9, 4, 17)]
    together = loss(model, batch)
    assert together.tokens.tolist() == [8, 3, 16]
    for text, nats in zip(batch, together.nats, strict=True):
        logits = model(torch.from_numpy(text)[None])[0, :-1].log_softmax(-1)
        own = -logits.gather(1, torch.from_numpy(text)[1:, None]).sum()
        assert nats == pytest.approx(float(own.detach()), rel=1e-5)


def test_slots_of_unequal_length_decode_as_each_text_alone() -> None:
    model, rng = small_model(), np.random.default_rng(1)
    batch = [rng.integers(0, 32, n) for n in (12, 7)]
    decoder = Decoder(model, n_slots=3, n_positions=20)
    slots = np.array([2, 0])
    for slot, text in zip(slots, batch, strict=True):
        decoder.prefill(int(slot), text[:-2])
    for at in (-2, -1):
        done = decoder.step(slots, np.array([text[at] for text in batch]))
    for row, text in enumerate(batch):
        wanted = model(torch.from_numpy(text)[None])[0, -1]
        torch.testing.assert_close(done.logits[row], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_compiled_experts_compute_what_the_model_does() -> None:
    torch.manual_seed(1)
    experts = Experts(16, 6, 4, 1.0)
    x, gates = torch.randn(5, 16), torch.rand(5, 2)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [0, 1]])
    with torch.no_grad():
        torch.testing.assert_close(mix(experts, x, gates, ids), experts(x, gates, ids))


@pytest.mark.parametrize("policy", ["all_far:bits=16", "ema:bits=16,far_bits=16"])
@pytest.mark.parametrize("forced", [True, False])
def test_at_full_width_the_closed_loop_is_the_recording(
    policy: str, forced: bool, bundled: Copies, task: Task, texts: dict[int, NDArray[np.int64]]
) -> None:
    live = loop.run(policy, task, bundled, texts, forced=forced)
    recorded = loop.run(policy, task)
    assert live.visited.sum() == 32
    assert loop.changed(live, task.trace) == (0.0, 0.0)
    assert live.measured.totals == recorded.measured.totals
    np.testing.assert_array_equal(live.measured.served, recorded.measured.served)


def test_few_bits_route_otherwise_and_replaying_what_they_routed_gives_the_same(
    bundled: Copies, task: Task, texts: dict[int, NDArray[np.int64]]
) -> None:
    policy = "ema:bits=3,far_bits=1"
    live = loop.run(policy, task, bundled, texts)
    sets, experts = loop.changed(live, task.trace)
    assert sets > experts > 0.05
    used = np.flatnonzero(live.served.sum(axis=(0, 1)))
    assert used.tolist() == [1, 3]
    assert live.n_tokens[0] == 33  # the prompt predicts one more than the steps
    again = loop.run(policy, replace(task, trace=live.trace))
    assert again.measured.totals == live.measured.totals
    assert loop.run(policy, task).measured.totals != live.measured.totals


def test_the_table_in_the_docs_can_be_measured_again(
    bundled: Copies, texts: dict[int, NDArray[np.int64]]
) -> None:
    with MAPS_CSV.open(encoding="utf-8") as file:
        rows = {(row["stratum"], row["kind"]): row for row in csv.DictReader(file)}
    text = [texts[0][: bitmaps.N_TOKENS]]
    losses = bitmaps.Losses(bundled, text, Cache(None))
    for bits in (3, 1):
        nats = losses.of(np.full(bundled.shape, bits, np.uint8))
        listed = float(rows["uniform", f"{bits} bits"]["first_text"])
        assert losses.delta(nats) == pytest.approx(listed, abs=0.003)


def test_maps_of_a_stratum_have_exactly_its_mean_bits() -> None:
    rng = np.random.default_rng(0)
    popularity = rng.random((8, 64))
    made = list(maps.equal_bits(popularity, rng.random((8, 64))))
    for each in made:
        assert each.stratum == f"mean {each.mean_bits:g}"
    assert {each.stratum for each in made} == {f"mean {mean:g}" for mean in maps.MEANS}
    hot = next(m for m in made if m.kind.startswith("hot high"))
    order = np.argsort(-popularity, axis=None)
    assert (np.diff(hot.bits.ravel()[order].astype(int)) <= 0).all()


def test_predictions_follow_the_quality_model(task: Task) -> None:
    model: MoESpec = task.model
    found = bitmaps.Sensitivity(
        noise=np.arange(8.0), widths=np.tile(np.arange(6) * 0.1, (8, 1)) * np.arange(1, 9)[:, None]
    )
    errors = np.zeros((8, 64, len(WIDTHS)))
    share, others = np.random.default_rng(0).random((2, 8, 64))
    ways = bitmaps.predictors(model, task.system.format, errors, found, share, others)
    bits = np.full((8, 64), 2, np.uint8)
    predicted = {name: bitmaps.predict(bits, way) for name, way in ways.items()}
    assert predicted[bitmaps.DEFAULT] == pytest.approx(3 * task.system.format.rel_mse[2])
    assert predicted["layers by noise"] == pytest.approx(3 * task.system.format.rel_mse[2])
    assert predicted["measured eps"] == 0.0
    assert predicted[bitmaps.BEST] == pytest.approx(found.widths[:, WIDTHS.index(2)].sum())
    bits[0] = 16  # the layer that noise does not hurt, and whose width cost least
    assert bitmaps.predict(bits, ways["layers by noise"]) == pytest.approx(
        predicted["layers by noise"]
    )
    hot = np.where(share > 0.5, 16, 1).astype(np.uint8)
    assert bitmaps.predict(hot, ways[bitmaps.DEFAULT]) < bitmaps.predict(
        hot, ways["popularity of train prompts"]
    )


def test_agreement_by_hand() -> None:
    assert agreement.ranks([3.0, 1.0, 3.0]).tolist() == [1.5, 0.0, 1.5]
    assert agreement.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0)
    assert agreement.spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert np.isnan(agreement.spearman([1, 1], [1, 2]))
    assert agreement.fitted_scale([1.0, 2.0], [2.0, 4.0]) == pytest.approx(2.0)
    assert agreement.explained([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert agreement.explained([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
    assert agreement.within(["a", "b", "a", "b"], [1, 1, 2, 2], [1, 2, 2, 1]) == {
        "a": pytest.approx(1.0), "b": pytest.approx(-1.0)
    }  # fmt: skip


def test_the_threshold_is_the_widest_row_that_replay_gets_wrong() -> None:
    def row(bits: float, live_speed: float, live_hits: float = 0.5) -> Loop:
        recorded = Speed(tokens_per_s=100.0, hit_rate=0.5, predicted_nats=0.1)
        live = Speed(tokens_per_s=live_speed, hit_rate=live_hits, predicted_nats=0.1)
        return Loop(
            policy="p", mean_bits=bits, open=recorded, forced=live, free=live,
            forced_changed=(0.5, 0.1), free_changed=(0.5, 0.1), true_nats=(0.1, 0.01),
            speed_interval=0.01, free_interval=0.02,
        )  # fmt: skip

    rows = [row(4, 100.5), row(3, 99.0), row(2, 100.0, live_hits=0.45), row(1, 90.0)]
    assert [summary.is_close(r) for r in rows] == [True, True, False, False]
    assert summary.threshold(rows) == 2
    assert summary.lowest_trusted(rows).mean_bits == 3
    assert summary.threshold(rows[:2]) == 0


def test_what_was_computed_is_kept_by_what_it_was_computed_from(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path), []

    def make() -> NDArray[np.float64]:
        calls.append(1)
        return np.array([float(len(calls))])

    first = cache.get(("a", np.array([1, 2])), make)
    assert cache.get(("a", np.array([1, 2])), make) == first
    assert cache.get(("a", np.array([1, 3])), make) != first
    assert len(calls) == 2
