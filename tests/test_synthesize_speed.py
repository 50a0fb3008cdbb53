"""A synthetic recording serves as fast as the recording it imitates, under every policy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ndp_gym.cli import main
from ndp_gym.synthesize import Pattern, Shape, fit_profile, write_trace
from ndp_gym.trace import RoutingTrace
from tests.test_synthesize import halves_by_conversation

POLICIES = ("lru", "ema", "prefill_topk", "static_popularity", "oracle_hot")
WITHIN = 0.03  # of the tokens per second; a window's routing moves them by a few per cent


def speeds(path: Path, folder: Path) -> dict[str, float]:
    out = folder / f"{path.name}.json"
    setting = [
        "--model",
        "mixtral-8x7b",
        "--system",
        "h100_cxl_pnm",
        "--hbm-budget",
        "0.05",
        "--batch-size",
        "1",
    ]
    files = ["--trace", str(path), "--json", str(out)]
    main(["evaluate", *setting, *files, "--policies", ",".join(POLICIES)])
    rows = json.loads(out.read_text())["rows"]
    return {row["policy"]: row["tokens_per_s"] for row in rows if row["policy"] in POLICIES}


@pytest.mark.shared
@pytest.mark.slow
def test_five_policies_are_as_fast_as_on_the_recording(
    mixtral_trace: RoutingTrace, tmp_path: Path
) -> None:
    """Fitted to half of the conversations; the control has popularity of no token or request."""
    real = mixtral_trace.save(tmp_path / "real")
    fitted, _ = halves_by_conversation(real)
    like = Pattern(
        profile=fit_profile(fitted),
        shape=Shape(n_layers=32, n_experts=8, top_k=2),
        model="mixtral (synthetic)",
        preset="mixtral-8x7b",
        source="synthetic",
        domains=real.requests.domains,
    )
    flat = replace(like.profile, popularity=(0.0,), fast=(0.0,), slow=0.0, coupling=0.0)
    write_trace(tmp_path / "like", like, real.requests, seed=3)
    write_trace(tmp_path / "control", replace(like, profile=flat), real.requests, seed=3)
    wanted = speeds(tmp_path / "real", tmp_path)
    assert set(wanted) == set(POLICIES)
    assert speeds(tmp_path / "like", tmp_path) == pytest.approx(wanted, rel=WITHIN)
    control = speeds(tmp_path / "control", tmp_path)
    off = [policy for policy in POLICIES if abs(control[policy] / wanted[policy] - 1) > WITHIN]
    assert {"lru", "ema", "oracle_hot"} <= set(off), control
