"""Fixtures shared by all tests: the third-party recordings and a tiny hand-made trace."""

import os
from pathlib import Path

import numpy as np
import pytest

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import Requests, assign_splits
from ndp_gym.validation.recordings import Recordings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--regenerate``, which rewrites the files of ``tests/golden``."""
    parser.addoption("--regenerate", action="store_true", help="rewrite tests/golden/*.json")


@pytest.fixture(autouse=True)
def unset_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables take their own width, not that of the terminal behind the test runner's workers."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """Folder of the third-party recordings; skips where it is absent."""
    folder = Path(os.environ.get("NDP_GYM_SHARED_TRACES", SHARED))
    if not (folder / "ATTRIBUTION.md").is_file():
        pytest.skip(
            f"NOT TESTED against third-party recordings: {folder} is absent "
            f"(set NDP_GYM_SHARED_TRACES)"
        )
    return folder


def make_trace(
    *,
    n_layers: int = 2,
    n_experts: int = 4,
    top_k: int = 2,
    n_conversations: int = 20,
    gates: bool = True,
    seed: int = 0,
) -> RoutingTrace:
    """A small trace: two domains, some conversations with two turns, 12..27 rows per request.

    Experts are skewed by domain, so that placement matters.
    """
    rng = np.random.default_rng(seed)
    conversation = np.repeat(
        np.arange(n_conversations), np.where(np.arange(n_conversations) % 4 == 0, 2, 1)
    )
    n_requests = len(conversation)
    length = rng.integers(12, 28, n_requests)
    domain = conversation % 2
    turn = np.concatenate([[0], (conversation[1:] == conversation[:-1]).astype(np.int64)])
    requests = Requests(
        start=np.cumsum(length) - length,
        n_prompt=rng.integers(3, 8, n_requests),
        length=length,
        context_offset=np.where(turn == 1, 20, 0).astype(np.int64),
        conversation=conversation,
        domain=domain,
        split=assign_splits(conversation, domain, seed=0),
        domains=("even", "odd"),
    )
    n_rows = int(length.sum())
    preference = rng.normal(size=(2, n_layers, n_experts))
    noise = rng.gumbel(size=(n_rows, n_layers, n_experts))
    score = preference[np.repeat(domain, length)] + noise
    ids = np.argsort(-score, axis=2)[:, :, :top_k]
    weights = (
        np.sort(rng.dirichlet(np.ones(top_k), size=(n_rows, n_layers)), axis=2)[:, :, ::-1] * 0.98
        + 0.02 / top_k
    )
    metadata = TraceMetadata(
        model="tiny",
        n_experts=n_experts,
        top_k=top_k,
        source="tests",
        licence="MIT",
        recorder="tests",
        id_order="router_rank",
    )
    return RoutingTrace.from_arrays(
        ids, requests, metadata, gate_weights=weights if gates else None
    )


@pytest.fixture(scope="session")
def tiny_trace() -> RoutingTrace:
    """L=2, E=4, K=2, 20 conversations in 25 requests, router-rank ids, gate weights."""
    return make_trace()


@pytest.fixture(scope="session")
def recordings(shared_traces: Path) -> Recordings:
    """The recordings that validation needs, with hit counts computed once."""
    return Recordings(shared_traces)


@pytest.fixture(scope="session")
def mixtral_trace(recordings: Recordings) -> RoutingTrace:
    """The eight HD-MoE files as one trace: 80 requests of Mixtral-8x7B."""
    return recordings.mixtral_trace
