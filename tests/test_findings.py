from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.explain import TERMS, Explanation, Side
from ndp_gym.plan import Plan
from ndp_gym.policy import PolicyContext
from ndp_gym.quality import QualityModel
from ndp_gym.results import Row, row_of
from train.findings import words
from train.findings.__main__ import main
from train.findings.controls import CONTROLS, ShownPopularity, control
from train.findings.measure import Found, Ratio, Verdict, family, measure, variants, within
from train.findings.recordings import BUNDLED, Recording, missing, recordings


def row(policy: str, speed: float | None, loss: float | None = 0.02, **values: Any) -> Row:
    facts = {"tokens_per_s": speed, "delta_nll_nats": loss, "mean_bits": 4.0, "sees_future": False}
    return row_of(policy, facts | {"hit_rate": 0.5, "validity": "in_range"} | values)


def verdict(lead: float, **terms: float) -> Verdict:
    """``terms`` in ms per token."""
    seconds = {name: Fraction(terms.get(name, 0.0)) / 1000 for name in TERMS}
    sides = [
        Side(name, s, 0.02, 0.5, 4.0)
        for name, s in (("a", Fraction(0)), ("b", -sum(seconds.values(), Fraction(0))))
    ]
    return Verdict(
        budget=0.03,
        winner=row("a", lead, hit_rate=0.56),
        runner=row("b", 1.0, hit_rate=0.46),
        lead=Ratio(value=lead, ci95=None, nats=0.0),
        why=Explanation(condition="", a=sides[0], b=sides[1], terms=seconds, n_tokens=1),
        oracle=None,
        hbm=None,
    )


def test_variants_belong_to_the_policy_they_are_variants_of() -> None:
    assert family("ema:bits=3,far_bits=3") == "ema"
    assert family("all_far4") == family("all_far:bits=3") == "all_far"
    assert len(set(variants())) == len(variants())


def test_only_rows_within_the_quality_budget_compete_and_the_fastest_comes_first() -> None:
    rows = [row("a", 5.0), row("b", 9.0), row("lossy", 20.0, 0.5), row("missing", None, None)]
    assert [r["policy"] for r in within(rows, 0.03)] == ["b", "a"]


def test_small_differences_and_intervals_around_one_cannot_be_told() -> None:
    def sign(value: float, ci95: tuple[float, float] | None = None) -> int:
        return words.differs(Ratio(value=value, ci95=ci95, nats=0.0))

    assert [sign(1.10), sign(1.01), sign(0.90)] == [1, 0, -1]
    assert [sign(1.10, (0.95, 1.20)), sign(0.90, (0.85, 0.94))] == [0, -1]


def test_a_lead_is_explained_by_its_large_parts_and_a_tie_is_called_one() -> None:
    text = words.why(verdict(1.10, hits=-1.0, bits=0.5, migration=-0.05))
    assert (
        text
        == "work, hits 56 against 46 %: -1.00 ms; bits 4.0 against 4.0: +0.50 ms; all: -0.55 ms"
    )
    assert words.main_term(verdict(1.10, hits=-1.0, bits=0.5)) == "hits"
    assert words.why(verdict(1.005, hits=-1.0)) == "a tie"
    assert words.main_term(verdict(1.005, hits=-1.0)) is None


def test_numbers_read_as_in_a_text() -> None:
    assert [words.rate(v) for v in (1234.5, 89.04, None)] == ["1230", "89", "-"]
    assert words.spread((1.0, 1.25), words.times) == " (1.00..1.25)"
    assert words.listed(Counter(a=1, b=3)) == "b 3, a 1"
    assert [words.joined(x) for x in (["a"], ["a", "b", "c"], [])] == ["a", "a, b and c", ""]


def test_a_control_differs_from_its_policy_in_the_ranking_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    class Spy:
        def reset(self, context: PolicyContext) -> None: ...

        def __call__(self, observation: Any) -> Plan | None:
            seen.update(observation)
            return None

    monkeypatch.setattr("train.findings.controls.resolve", lambda name: Spy)
    shown = ShownPopularity("prefill_topk")
    profile = np.array([[3.0, 1.0]])
    shown.reset(context_with(profile))
    shown({"prefill_load": np.zeros((1, 2), np.float32), "tier": np.ones((1, 2), np.float32)})
    assert seen["prefill_load"].tolist() == [[3, 1]]
    assert seen["gate_share"].tolist() == [[0.75, 0.25]]
    assert seen["tier"].tolist() == [[1, 1]]


def context_with(profile: np.ndarray[Any, np.dtype[np.float64]]) -> PolicyContext:
    from ndp_gym import presets

    return PolicyContext(
        model=presets.model("mixtral-8x7b"),
        system=presets.system("h100_cxl_pnm"),
        batch_size=1,
        window=1,
        hbm_budget_bytes=0,
        quality=QualityModel(),
        quality_weight=4.0,
        menu=(),
        rng=np.random.default_rng(0),
        profile=profile,
        future=None,
    )


def test_one_condition_of_the_bundled_recording_has_winners_and_controls(tmp_path: Path) -> None:
    (bundled,) = recordings(tmp_path, tmp_path)
    assert bundled.title == BUNDLED
    found = measure(bundled.title, bundled.path, "h100_cxl_pnm", 4, windows=2)
    assert isinstance(found, Found)
    for v in found.verdicts:
        assert v.winner is not None
        assert v.runner is not None
        assert v.lead is not None
        assert v.lead.value >= 1
        assert (v.winner["delta_nll_nats"] or 0.0) <= v.budget
        assert family(v.winner["policy"]) != family(v.runner["policy"])
    assert {("prefill_topk", kind) for kind in CONTROLS} <= found.prefill.keys()
    assert control("prefill_topk", "noise") not in {r["policy"] for r in found.rows}


def test_absent_recordings_are_named_and_batches_never_exceed_the_requests(tmp_path: Path) -> None:
    assert len(missing(tmp_path)) == 7
    small = Recording(
        title="", path=tmp_path, notes=(), n_requests=3, n_conversations=3, n_tokens=9
    )
    assert small.batch_sizes((1, 4, 16)) == [1, 3]


@pytest.mark.slow
def test_a_quick_page_is_written_without_third_party_recordings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "findings.md"
    assert main(["--quick", "--recordings", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "## Where prefill context helps" in text
    assert "SKIPPED: Mixtral-8x7B" in capsys.readouterr().err
    assert "**Skipped: Mixtral-8x7B" in text
