import re
from pathlib import Path

import pytest

from ndp_gym.evaluation import evaluate

README = Path(__file__).resolve().parent.parent / "README.md"
ROW = re.compile(
    r"^\| `(\w+)`[^|]*\| ([\d,]+) \(([\d,]+)\u2013([\d,]+)\) \| ([\d.]+) \| [^|]+ \| ([\d.]+) \|",
    re.M,
)


@pytest.mark.slow
def test_the_results_table_is_what_the_demo_computes() -> None:
    table = {
        m[1]: tuple(float(x.replace(",", "")) for x in m.groups()[1:])
        for m in ROW.finditer(README.read_text())
    }
    assert len(table) >= 8
    result = evaluate(list(table), seeds=range(3))
    rows = {row["policy"]: row for row in result.rows}
    for name, (tokens_per_s, low, high, speedup, delta_nll) in table.items():
        row = rows[name]
        assert row["tokens_per_s"] == pytest.approx(tokens_per_s, rel=0.01), name
        assert row["tokens_per_s_ci95"] == pytest.approx((low, high), rel=0.01), name
        assert row["speedup_vs_all_far4"] == pytest.approx(speedup, abs=0.011), name
        assert row["delta_nll_nats"] == pytest.approx(delta_nll, abs=0.0011), name


def test_the_lead_of_agents_is_that_of_the_results_page() -> None:
    page = (README.parent / "docs" / "results.md").read_text(encoding="utf-8")
    line = r"^- `{}`: layer agents .* throughput at equal ΔNLL \+([\d.]+)%"
    names = ("fix", "rand", "hidden", "drift")
    leads = [float(re.search(line.format(name), page, re.M)[1]) for name in names]
    assert f"by {min(leads)} to {max(leads)} % of throughput at equal ΔNLL" in README.read_text(
        encoding="utf-8"
    )
