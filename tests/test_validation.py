"""Published against ours: tolerances, regressions, and how the table is shown."""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import cost
from ndp_gym.cli import main
from ndp_gym.plan import FAR, HBM, Placement, Plan
from ndp_gym.simulate import initial_state, transition
from ndp_gym.state import Window
from ndp_gym.validation import page, plots, results, seed, sweep
from ndp_gym.validation.expected import EXPECTED_FAILURES
from ndp_gym.validation.hits import counts, off_gpu, top_experts
from ndp_gym.validation.orderings import Pair, compare
from ndp_gym.validation.recordings import Recordings
from ndp_gym.validation.summary import Validation, validate
from ndp_gym.validation.targets import Target, load_targets

DOCS = Path(__file__).resolve().parents[1] / "docs"
TARGETS_SHA256 = "70f9cb8c9b0559aa0c2c85ebfb5ded5ca5c936ab89aa4580dda2bbb0b3527a6f"


@pytest.fixture(scope="session")
def found(recordings) -> Validation:
    """Everything, computed once."""
    return validate(recordings)


@pytest.fixture(scope="session")
def cases(recordings) -> dict[str, seed.Seed]:
    return {size: seed.seed(recordings, size) for size in seed.RESIDENT}


def values(found: Validation, prefix: str) -> list[float]:
    return [row.ours for row in found.rows if row.target.id.startswith(prefix)]


def test_given_targets_are_unchanged_and_ids_are_unique():
    data = resources.files("ndp_gym.validation").joinpath("targets.csv").read_bytes()
    assert hashlib.sha256(data).hexdigest() == TARGETS_SHA256
    ids = [target.id for target in load_targets()]
    assert len(ids) == len(set(ids))
    assert set(ids) >= EXPECTED_FAILURES.keys()


def test_every_target_is_computed_and_only_expected_ones_fail(found):
    assert [row.target for row in found.rows] == list(load_targets())
    assert all(row.ok is not None for row in found.rows)
    assert not found.missing
    failing = {row.target.id for row in found.rows if not row.ok}
    assert failing == EXPECTED_FAILURES.keys()


# What this model said when its constants were fixed: within 2 % or one unit of the last digit.
PRINTED = {
    "seed/decode-ratio/": (8.31, 11.00, 8.86, 12.37),
    "seed/tokens-per-s/": (1.67, 14.80, 20.67),
    "seed/decode-ratio-monde-rule/": (9.11, 12.06, 6.58, 9.18),
    "seed/ndp-latency/": (4.92, 7.11),
    "seed/end-to-end-": (6.5, 7.8, 8.0, 10.1, 7.8, 8.6, 10.3, 11.8),
    "seed/hobbit-ratio/": (17.0, 20.9),
}


@pytest.mark.parametrize("prefix", PRINTED)
def test_seed_rows_repeat_the_documented_model(found, prefix):
    ours = values(found, prefix)
    assert len(ours) == len(PRINTED[prefix])
    for value, printed in zip(ours, PRINTED[prefix], strict=True):
        assert value == pytest.approx(printed, rel=0.02)


@pytest.mark.parametrize("system", ["seed_sim", "h100_seed_ndp"])
def test_seed_speeds_repeat_the_documented_model(recordings, system):
    printed = {
        "seed_sim": {"8x7b": (7.41, 61.6, 81.5), "8x22b": (1.67, 14.8, 20.7)},
        "h100_seed_ndp": {"8x7b": (7.33, 56.9, 73.5), "8x22b": (1.66, 14.4, 19.8)},
    }
    for size, expected in printed[system].items():
        case = seed.seed(recordings, size, seed.FITTED, system)
        steps = (case.monde_seed_step_s(), case.ours_step_s(3), case.ours_step_s(2))
        assert [1 / s for s in steps] == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("size", "widest"), [("8x7b", 8), ("8x22b", 4)])
def test_systems_of_the_seed_rank_as_published(cases, size, widest):
    case = cases[size]
    steps = [
        case.hobbit_step_s(),
        case.monde_seed_step_s(),
        case.ours_step_s(3),
        case.ours_step_s(2),
        case.all_hbm_step_s(widest),
    ]
    assert steps == sorted(steps, reverse=True)
    assert cases["8x22b"].all_hbm_step_s(8) is None  # does not fit


def test_far_latency_follows_stored_bits_exactly():
    assert seed.far_latency_ratio(3) == pytest.approx(16 / 3.25, rel=1e-9)
    assert seed.far_latency_ratio(2) == pytest.approx(16 / 2.25, rel=1e-9)


def test_moving_whole_experts_never_pays_at_batch_1(cases):
    case = cases["8x7b"]
    in_place = case.step_s(float(case.layer_s(16, 2)))
    assert case.monde_rule_step_s() == pytest.approx(in_place)


def test_migration_credit_is_spent_once_and_carried_over():
    off = np.array([[1, 0, 1], [2, 1, 1]])  # credit .4 .4 .8 | 1.6 1.0 .4
    pairs = seed.migration_pairs(off, 0.4) * off.size
    assert pairs.sum() == pytest.approx(6)
    assert pairs[2, 1] == pytest.approx(1)
    assert pairs[1, 1] == pytest.approx(1)
    assert pairs[0, 0] == pytest.approx(1)


def test_hits_and_times_agree_with_the_simulator(recordings, cases):
    """One request under the seed's plan: the replayed window and the counted hits say the same."""
    case, part = cases["8x7b"], recordings.mixtral_parts[0]
    trace = recordings.mixtral_trace
    resident = top_experts(counts(part.prefill, 8), 4)
    placement = Placement(
        tier=np.where(resident, HBM, FAR), bitwidth=np.where(resident, 16, 3).astype(np.uint8)
    )
    request = int(np.flatnonzero(trace.requests.n_decode >= 65)[0])
    first = trace.requests.start[request] + trace.requests.n_prompt[request]
    window = Window(
        expert_ids=trace.expert_ids,
        gate_weights=None,
        first_row=np.array([first]),
        n_rows=np.array([64]),
        context=np.array([seed.CONTEXT]),
        length=64,
        gate_profile=np.array(case.model.gate_profile),
    )
    state = initial_state(case.model, case.system)
    budget = 32 * 4 * case.expert_bytes16
    _, outcome = transition(
        state, Plan(placement=placement), window, case.model, case.system, budget_bytes=budget
    )
    off = off_gpu(part.decode[:64], resident)
    assert outcome.routed - outcome.hits == off.sum()
    assert float(outcome.far_s.sum()) == pytest.approx(
        off.sum() * float(cost.far_expert_s(case.model, case.system, 3, 1))
    )
    contexts = seed.CONTEXT + np.arange(1, 65)  # here it grows, in the published rows it does not
    grown = [cost.attention_s(case.model, case.system.gpu, [c]).sum() for c in contexts]
    layers = case.layer_s(3, off) - case.attention_s
    assert float(outcome.layer_s.sum()) == pytest.approx(float(layers.sum()) + sum(grown))


def test_sweep_meets_its_tolerances():
    low = sweep.model_x("dynamic")[:5] - sweep.measured_x("dynamic")[:5]
    assert np.sqrt((low**2).mean()) <= 0.06
    assert sweep.rmse("random", floor=0.0) > 0.08
    speed = {policy: sweep.tokens_per_s(policy)[:3] for policy in sweep.POLICIES}
    assert (speed["dynamic"] > speed["frequency"]).all()
    assert (speed["frequency"] > speed["random"]).all()
    assert len(sweep.SEEDS) >= 3
    assert sweep.N_REQUESTS >= 8


def test_sweep_residencies_hold_the_share_they_claim():
    rng = np.random.default_rng(0)
    routing = sweep.generate(
        rng, n_layers=4, n_experts=20, top_k=3, n_requests=2, n_prompt=50, n_decode=5
    )
    ids = np.sort(routing.decode, axis=-1)
    assert (ids[..., 1:] > ids[..., :-1]).all()  # drawn without replacement
    assert routing.prefill_load.sum() == 2 * 50 * 4 * 3
    for policy in sweep.POLICIES:
        found = list(sweep.residencies(policy, routing, 0.3, rng))
        assert [request for request, _ in found] == [0, 1]
        assert all(resident.sum() == 0.3 * 80 for _, resident in found)
    assert (routing.prefill_load[0] != routing.prefill_load[1]).any()


def test_skew_of_the_generated_routing_is_the_documented_one():
    """The top tenth takes 0.40 of a request, 0.25 over all of them."""
    rng = np.random.default_rng(0)
    shape = {"n_layers": 4, "n_experts": 512, "top_k": 10}
    routing = sweep.generate(rng, **shape, n_requests=16, n_prompt=512, n_decode=1)
    each = np.sort(routing.prefill_load, axis=-1)[..., -51:].sum() / routing.prefill_load.sum()
    pooled = routing.prefill_load.sum(axis=0)
    assert each == pytest.approx(0.40, abs=0.02)
    assert np.sort(pooled, axis=-1)[:, -51:].sum() / pooled.sum() == pytest.approx(0.25, abs=0.02)


def test_constants_survive_without_one_source(found):
    assert {fold.constants for fold in found.folds} >= {"kappa of mse_g128", "eta_n of CPUs"}
    engine = [fold for fold in found.folds if "engine" in fold.constants]
    assert [fold.fitted for fold in engine] == [
        pytest.approx((0.50, 0.049), rel=0.02),  # fixed with the constants
        pytest.approx((0.55, 0.064), rel=0.02),
    ]
    kappa = next(fold for fold in found.folds if fold.left_out == "GEMQ")
    assert kappa.fitted[0] == pytest.approx(3.02, abs=0.005)  # the three PMQ points alone
    assert all(abs(np.log(fold.worst)) < 0.35 for fold in found.folds if fold.ratios)


def test_rankings_follow_the_measurements(found):
    taus = {ordering.name: ordering.tau for ordering in found.orderings}
    assert taus["- up to 60 % on the GPU"] == 1.0
    assert taus["CPU-offload engines"] > 0.8
    assert taus["models and GPUs in HBM at equal batch"] > 0.7


def test_close_pairs_do_not_count_and_ties_of_ours_are_wrong():
    group = [Pair(100, 1), Pair(104, 0), Pair(120, 1), Pair(150, 9)]
    # 100-104 is too close; 100-120 is a tie of ours; the other four agree
    assert compare("x", [group])[1:] == (5, 4)
    assert compare("x", [group]).tau == pytest.approx(0.6)
    assert compare("x", [group[:1]]).tau is None


@pytest.mark.parametrize(
    ("mode", "tolerance", "ours", "accepted"),
    [
        ("rel", 0.1, 9.01, True),
        ("rel", 0.1, 11.1, False),
        ("abs", 0.5, 10.5, True),
        ("abs", 0.5, 10.6, False),
        ("min", 0.0, 10.0, True),
        ("min", 0.0, 9.9, False),
        ("bracket", 0.1, (11.0, 14.0), True),
        ("bracket", 0.1, (12.0, 11.2), False),
        ("factor-1", 2.0, 29.0, True),
    ],
)
def test_modes_of_agreement(mode, tolerance, ours, accepted):
    assert target(mode=mode, tolerance=tolerance).accepts(ours) is accepted


def target(**changes) -> Target:
    fields = {
        **{"id": "a/b", "group": "a", "source": "s", "quantity": "q", "published": 10.0},
        **{"kind": "predicted", "tolerance": 0.1, "mode": "rel"},
    }
    return Target(**(fields | changes))


def test_malformed_targets_are_refused():
    with pytest.raises(ValueError, match=r"target 'a/b': mode must be one of .*, got 'near'"):
        target(mode="near")
    with pytest.raises(ValueError, match="tolerance must be >= 0, got -1"):
        target(tolerance=-1)


def test_only_what_is_measured_enters_the_error_statistics():
    rows = [
        results.Row(target=target(**changes), ours=ours, ok=True)
        for changes, ours in (
            ({}, 20.0),
            ({"published": 0.0, "mode": "abs"}, 0.05),  # a residual
            ({"published": 1.0, "mode": "abs", "tolerance": 0.0}, 1.0),  # yes or no
            ({"kind": "calibrated"}, 10.0),
        )
    ]
    assert results.errors(rows) == (1, pytest.approx(np.log(2)), pytest.approx(np.log(2)))
    assert results.errors(rows, "bound") is None


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def test_committed_page_is_what_the_code_computes(found, recordings):
    """Equal up to numeric formatting; write it anew with ``ndp-gym validate --write-docs``."""
    committed = (DOCS / "validation.md").read_text(encoding="utf-8")
    computed = page.text(found, recordings)
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", computed)
    pairs = zip(NUMBER.findall(committed), NUMBER.findall(computed), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=0.01, abs=1e-6) for a, b in pairs)
    for picture in re.findall(r"\]\((img/[^)]+)\)", committed):
        assert (DOCS / picture).is_file()
    for file in ("experts_<domain>_mixtral.json", "gptoss-all.tokens.jsonl"):
        assert file in committed


def test_every_group_with_a_picture_is_drawn(found):
    files = plots.draw_all(found.rows)
    assert {f"validation-{name}.svg" for name in page.PLOTS.values()} == files.keys()
    assert all(data.startswith(b"<?xml") for data in files.values())


def test_without_recordings_rows_are_skipped_loudly(tmp_path, capsys):
    document = tmp_path / "out.json"
    assert main(["validate", "--recordings", str(tmp_path), "--json", str(document)]) == 0
    shown = capsys.readouterr().out
    assert "SKIPPED 23 rows: get expert_trace/mixtral" in shown
    assert "SKIPPED 8 rows: get traces/gptoss-all.tokens.jsonl" in shown
    rows = {row["target"]: row for row in json.loads(document.read_text())["rows"]}
    assert rows.keys() == {t.id for t in load_targets()}
    skipped = rows["seed/decode-ratio/8x7b/3bit"]
    assert (skipped["ours"], skipped["ratio"], skipped["ok"]) == (None, None, None)
    assert "github.com/angerybob/HD-MoE" in skipped["skipped"]
    kept = rows["cpu-offload/fiddler"]
    assert kept["kind"] == "bound"
    assert kept["ratio"] == pytest.approx(kept["ours"] / kept["published"])


def test_narrow_screens_keep_targets_whole_and_end_with_the_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["validate", "--recordings", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert all(any(line.startswith(t.id + " ") for line in lines) for t in load_targets())
    assert sum("NO, expected" in line for line in lines) > 5
    verdict = rf"{len(load_targets())} rows: \d+ agree .* 0 fail unexpectedly, \d+ skipped"
    assert re.fullmatch(verdict, lines[-1])


def test_an_unexpected_failure_is_named_and_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "EXPECTED_FAILURES", {})
    assert main(["validate", "--recordings", str(tmp_path)]) == 1
    assert "FAILS UNEXPECTEDLY: itl/qwen3-30b-bf16/h20/b1" in capsys.readouterr().out


def test_the_page_is_not_written_without_all_recordings(tmp_path, capsys):
    docs = tmp_path / "docs"
    assert main(["validate", "--recordings", str(tmp_path), "--write-docs", str(docs)]) == 2
    assert "the page needs all recordings" in capsys.readouterr().err
    assert not docs.exists()
    assert main(["validate", "--recordings", str(tmp_path / "none")]) == 2


def test_recordings_are_found_plain_or_gzipped(tmp_path):
    folder = tmp_path / "BrianBoitano__nvmoe/traces"
    folder.mkdir(parents=True)
    assert len(Recordings(tmp_path).missing()) == 2
    (folder / "gptoss-all.tokens.jsonl").touch()
    assert len(Recordings(tmp_path).missing()) == 1
