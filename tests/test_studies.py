"""The studies of schedules: their rules by hand, and their pages against what they generate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ndp_gym import presets
from ndp_gym.cost import activation_transfer_s, engine_s, expert_bytes
from train.studies import dovetail, klotski
from train.studies.pipeline import LayerWork, smallest_n
from train.studies.recordings import Studied, studied

PAGES = Path(__file__).resolve().parent.parent / "docs/studies"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
STUDIES = [
    pytest.param("klotski", klotski.OPENING, klotski.section, id="klotski"),
    pytest.param("dovetail", dovetail.OPENING, dovetail.section, id="dovetail"),
]


def layer(n: int) -> LayerWork:
    """Attention 1 s; expert 0 is cold (copy 10 s, compute 1 s), expert 1 hot (compute 2 s)."""
    return LayerWork(
        n_batches=n,
        attention_s=np.array([1.0]),
        expert_s=np.array([[1.0, 2.0]]),
        copy_s=np.array([[10.0, 0.0]]),
        known_after=np.array([[1, 1]]),
    )


@pytest.mark.parametrize(("hot_first", "n"), [(True, 9), (False, 11)])
def test_the_smallest_n_computes_for_as_long_as_the_copy_takes(hot_first: bool, n: int) -> None:
    # the copy is complete at 1 + 10 s; n s of attention and, hot first, 2 s of expert 1 come before
    def bubble(batches: int) -> float:
        return layer(batches).bubble_share(hot_first)

    assert smallest_n(bubble, 64, tolerance=0.0) == n
    assert bubble(n - 1) == pytest.approx(1 / (n - 1 + 3 + 1))
    assert smallest_n(bubble, n - 1, tolerance=0.0) is None


def test_a_layer_ends_when_its_last_expert_is_computed() -> None:
    work = layer(4)  # 4 s attention, expert 1 until 6 s, expert 0 from 11 to 12 s
    assert work.end_s(True) == pytest.approx(12.0)
    assert work.end_s(False) == pytest.approx(14.0)  # expert 1 waits behind expert 0
    assert work.busy_s == pytest.approx(7.0)
    assert work.sequential_s() == pytest.approx(17.0)


def test_copies_wait_for_the_batch_that_needs_them_and_for_one_another() -> None:
    work = LayerWork(
        n_batches=3,
        attention_s=np.array([1.0]),
        expert_s=np.array([[1.0, 1.0, 1.0, 0.0]]),
        copy_s=np.array([[2.0, 2.0, 2.0, 0.0]]),
        known_after=np.array([[3, 1, 1, 3]]),
    )
    assert work.arrival_s(True).tolist() == [[7.0, 3.0, 5.0, 0.0]]
    assert work.end_s(True) == pytest.approx(8.0)  # 3, 4; 5, 6; 7, 8
    assert work.end_s(False) == pytest.approx(10.0)  # expert 0 from 7 s, then 1 and 2


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 100])
def test_doubling_and_halving_find_the_smallest_n(n: int) -> None:
    assert smallest_n(lambda m: float(m < n), 100, tolerance=0.01) == n


def test_a_draft_that_is_never_accepted_only_costs_and_one_always_accepted_saves_steps() -> None:
    verify = [10.0, 12.0, 14.0]
    assert dovetail.speedup(0.0, 0.5, verify, 2) == pytest.approx(10 / (2 * 0.5 + 14))
    assert dovetail.speedup(1.0, 0.5, verify, 2) == pytest.approx(3 * 10 / (2 * 0.5 + 14))
    assert dovetail.speedup(0.7, 0.5, verify, 0) == 1.0
    assert dovetail.best_k(0.0, 0.5, verify) == 0
    assert dovetail.best_k(1.0, 0.5, verify) == 2


def test_accepted_tokens_are_the_sum_of_a_geometric_series() -> None:
    assert dovetail.accepted_tokens(0.0, 5) == 1.0
    assert dovetail.accepted_tokens(1.0, 5) == 6.0
    assert dovetail.accepted_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)


def test_rows_that_share_experts_cost_the_far_device_no_second_reading() -> None:
    model, system = presets.model("mixtral-8x7b"), presets.system("h100_cxl_pnm")
    counts = np.zeros((model.n_layers, model.n_experts), np.int64)
    counts[:, :2] = 1
    one, two = (dovetail.step_s(model, system, 16, m * counts, 1, m) for m in (1, 2))
    assert dovetail.free_rows(model, system, 16) > 2
    sent = float(activation_transfer_s(model, system.link, 2))
    sent -= float(activation_transfer_s(model, system.link, 1))
    engine = engine_s(system, 2) - engine_s(system, 1)
    assert two - one == pytest.approx(model.n_layers * sent + engine)
    other = np.roll(counts, 2, axis=1) + counts  # the second row chooses two other experts
    far = system.far
    read = expert_bytes(model, system.format, 16) / (far.efficiency * far.bandwidth_bytes_per_s)
    apart = dovetail.step_s(model, system, 16, other, 1, 2)
    assert apart - two == pytest.approx(model.n_layers * 2 * read)


@pytest.fixture(scope="module")
def bundled() -> Studied:
    return next(studied(Path("absent")))


def test_recordings_that_are_absent_are_said_to_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list(studied(tmp_path))) == 1
    assert "SKIPPED: Mixtral-8x7B" in capsys.readouterr().err


def assert_shown(name: str, lines: str) -> None:
    """The text stands on the page, numbers to 1 %."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8").splitlines()
    expected = lines.rstrip().splitlines()
    first = page.index(expected[0])
    for shown, made in zip(page[first : first + len(expected)], expected, strict=True):
        assert NUMBER.sub("#", shown) == NUMBER.sub("#", made)
        for a, b in zip(NUMBER.findall(shown), NUMBER.findall(made), strict=True):
            assert math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=0.1), (shown, made)


Section = Callable[[Studied], Iterator[str]]


@pytest.mark.parametrize(("name", "opening", "section"), STUDIES)
def test_the_page_is_what_the_script_writes(
    name: str, opening: str, section: Section, bundled: Studied
) -> None:
    assert_shown(name, opening)
    assert_shown(name, "\n".join(section(bundled)))


@pytest.mark.shared
@pytest.mark.parametrize(("name", "opening", "section"), STUDIES)
def test_the_page_is_what_the_script_writes_about_mixtral(
    name: str, opening: str, section: Section, shared_traces: Path
) -> None:
    _, mixtral = studied(shared_traces)
    assert_shown(name, "\n".join(section(mixtral)))
