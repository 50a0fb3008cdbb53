"""What the benchmark runs in processes of their own: a 10 GB recording, and a first window."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym import presets
from ndp_gym.lanes import Lanes
from ndp_gym.trace import Requests, RoutingTrace, TraceMetadata
from ndp_gym.trace_file import serialise_header

LENGTH, N_PROMPT = 1000, 128
MODEL = "gpt-oss-120b"
SYSTEM = "h100_structera"


def write_large(path: Path) -> int:
    """A sparse 10 GB recording in which every hundredth request has content -> bytes.

    The other requests are holes that read as zeros, so they are put into another split.
    """
    model = presets.model(MODEL)
    n_rows = 10 * 10**9 // (3 * model.n_layers * model.top_k) // LENGTH * LENGTH
    shape = (n_rows, model.n_layers, model.top_k)
    start = np.arange(0, n_rows, LENGTH, dtype=np.int64)
    has_content = np.arange(start.size) % 100 == 0
    zero = np.zeros_like(start)
    requests = Requests(
        start=start,
        n_prompt=zero + N_PROMPT,
        length=zero + LENGTH,
        context_offset=zero,
        conversation=np.arange(start.size),
        domain=zero,
        split=np.where(has_content, 2, 0),
        domains=("random",),
    )
    metadata = TraceMetadata(model=MODEL, n_experts=model.n_experts, top_k=model.top_k)
    tensors: dict[str, NDArray[Any]] = {
        "requests": requests.table(),
        "gate_weights": np.broadcast_to(np.float16(0), shape),
        "expert_ids": np.broadcast_to(np.uint8(0), shape),
    }
    header = serialise_header(tensors, metadata.to_json(requests.domains))
    rng = np.random.default_rng(0)
    keys = rng.random((LENGTH, *shape[1:-1], model.n_experts))
    ids = np.argsort(keys, axis=2)[..., : model.top_k].astype(np.uint8)
    gates = np.full(ids.shape, 1.0 / model.top_k, np.float16)
    with path.open("wb") as file:
        file.write(header)
        file.write(tensors["requests"].tobytes())
        first_gate = file.tell()
        first_id = first_gate + tensors["gate_weights"].nbytes
        for row in start[has_content]:
            file.seek(first_gate + int(row) * gates[0].nbytes)
            file.write(gates.tobytes())
            file.seek(first_id + int(row) * ids[0].nbytes)
            file.write(ids.tobytes())
        file.truncate(first_id + tensors["expert_ids"].nbytes)
    return path.stat().st_size


def step_large(path: str) -> None:
    """Print the seconds to open ``path`` and this process's anonymous bytes after 50 windows."""
    model, system = presets.model(MODEL), presets.system(SYSTEM)
    started = time.perf_counter()
    trace = RoutingTrace.open(path)
    open_s = time.perf_counter() - started
    lanes = Lanes(trace, model, system)
    lanes.reset(0, np.random.default_rng(0).permutation(trace.split_requests("test")))
    tier = np.ones((1, *lanes.shape), np.uint8)
    for _ in range(50):
        lanes.advance(tier, tier * 4)
        lanes.observe()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    print(open_s, int(anonymous.split()[1]) * 1024)


def first_window() -> None:
    """Open the bundled recording and replay one window, as a user's first step does."""
    import gymnasium as gym

    import ndp_gym  # noqa: F401  # registers the id

    env = gym.make("NDPPlacement-v0")
    env.reset(seed=0)
    env.action_space.seed(0)
    env.step(env.action_space.sample())
