"""Speed of the parts that decide how long training and evaluation take; every ratio in one run.

Recordings are drawn here with the shapes of real models (random experts, so that as many distinct
ones are hit as possible). Numbers depend on the machine; ratios less so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ndp_gym import presets
from ndp_gym.lanes import Lanes
from ndp_gym.specs import MoESpec
from ndp_gym.trace import Requests, RoutingTrace, TraceMetadata

BATCH_SIZE, WINDOW, N_ENVS = 8, 16, 64
SYSTEM = "h100_cxl_seed_ndp"


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One measured figure, beside the baseline measured in the same run (``None`` where none)."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_name: str = ""

    @property
    def ratio(self) -> float | None:
        """Value over baseline."""
        return None if not self.baseline else self.value / self.baseline

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in the JSON."""
        return {**asdict(self), "ratio": self.ratio}


def rows() -> Iterator[BenchRow]:
    """All figures, one after the other."""
    for name in ("mixtral-8x7b", "deepseek-v2-lite"):
        yield from kernel_rates(name)
    yield vector_rate()
    yield from condition_rates()
    yield step_overhead()
    yield from large_file()
    yield from start_up()
    yield from cache_replay()


def random_trace(model: MoESpec, *, n_requests: int, n_prompt: int, n_decode: int) -> RoutingTrace:
    """Uniformly random distinct experts and gates in the shape of ``model``; seeded."""
    rng = np.random.default_rng(0)
    length = n_prompt + n_decode
    shape = (n_requests * length, model.n_layers, model.top_k)
    ids = np.empty(shape, np.uint16)
    for first in range(0, shape[0], 4096):
        rows = ids[first : first + 4096]
        keys = rng.random((*rows.shape[:2], model.n_experts), np.float32)
        rows[:] = np.argpartition(keys, model.top_k, axis=2)[..., : model.top_k]
    index = np.arange(n_requests, dtype=np.int64)
    zero = np.zeros_like(index)
    requests = Requests(
        start=index * length,
        n_prompt=zero + n_prompt,
        length=zero + length,
        context_offset=zero,
        conversation=index,
        domain=zero,
        split=np.asarray(index % 3),
        domains=("random",),
    )
    metadata = TraceMetadata(model=model.name, n_experts=model.n_experts, top_k=model.top_k)
    gates = rng.random(shape, np.float32).astype(np.float16) + np.float16(0.01)
    return RoutingTrace.from_arrays(ids, requests, metadata, gate_weights=gates)


def kernel_rates(model_name: str) -> Iterator[BenchRow]:
    """Routed (token, layer, expert) per second of one core inside the kernel, plans changing."""
    from ndp_gym import kernel

    model = presets.model(model_name)
    trace = random_trace(model, n_requests=32, n_prompt=16, n_decode=16 * WINDOW)
    lanes = Lanes(trace, model, presets.system(SYSTEM), batch_size=BATCH_SIZE, window=WINDOW)
    plans = _plans(lanes, 8)
    whole, reference = [], []

    def clocked(run: Callable[..., object], *args: Any) -> None:
        whole.append(_clock_s(lambda: run(*args)))
        reference.append(_reference_s(*args))

    with _replaced(kernel, "run_lanes", clocked):
        for _ in range(6):
            lanes.reset(0, np.arange(32))
            window = 0
            while not lanes.is_done[0]:
                lanes.advance(*plans[window % len(plans)])
                window += 1
    n_routed = BATCH_SIZE * WINDOW * model.n_layers * model.top_k
    baseline = _bincount_rate(trace, model)
    seconds = np.array([whole, np.subtract(whole, reference)])[:, 8:]
    for name, value in zip(("with", "without"), np.median(seconds, axis=1), strict=True):
        yield BenchRow(
            name=f"routed experts per second, {model_name}, {name} reference replay",
            value=n_routed / float(value),
            unit="1/s",
            baseline=baseline,
            baseline_name="numpy.bincount of the same ids, no accounting",
        )


def _reference_s(first: int, _last: int, windows: Any, *args: Any) -> float:
    """Seconds of the stateless reference alone, on the arguments of one `run_lanes` call."""
    from ndp_gym import kernel

    _, prices, _, no_state, counts, _, replay, _ = args
    n_layers = windows.expert_ids.shape[1]
    scratch = type(replay)(*(np.zeros_like(array) for array in replay))
    room = np.zeros(n_layers, np.int64), np.int64(0)
    total = np.zeros(counts.tokens.shape[1], np.int32)
    kernel.count_window(windows, first, total.size // n_layers, counts)
    started = time.perf_counter()
    kernel.replay_window(
        windows, first, counts, prices.ref_place, prices.ref_service, prices.ref_rates,
        prices.ref_rank_bits, room, prices, no_state, np.int64(0), scratch,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    kernel.collect_counts(counts, total, np.zeros(total.size))
    return seconds


def _bincount_rate(trace: RoutingTrace, model: MoESpec) -> float:
    """Routed experts per second of the least numpy can do: count ids per (step, layer, expert)."""
    n = BATCH_SIZE * WINDOW
    codes = np.arange(model.n_layers)[:, None] * model.n_experts
    steps = (np.arange(n) // BATCH_SIZE * (model.n_layers * model.n_experts))[:, None, None]
    size = WINDOW * model.n_layers * model.n_experts

    def count() -> None:
        ids = trace.expert_ids[:n].astype(np.int64) + codes + steps
        np.bincount(ids.ravel(), minlength=size)

    return n * model.n_layers * model.top_k / _best_s(count)


def vector_rate() -> BenchRow:
    """Windows per second of the vector env (64 copies), against one env after the other."""
    import gymnasium as gym

    with _mixtral_file() as kwargs:
        venv = gym.make_vec(
            "NDPPlacement-v0", num_envs=N_ENVS, vectorization_mode="vector_entry_point", **kwargs
        )
        venv.reset(seed=0)
        venv.action_space.seed(0)
        actions = [venv.action_space.sample() for _ in range(4)]
        venv.step(actions[0])
        steps = [_clock_s(lambda a=a: venv.step(a)) for a in actions * 10]  # type: ignore[misc]
        env = gym.make("NDPPlacement-v0", **kwargs).unwrapped
        single = _single_steps(env)
    return BenchRow(
        name=f"windows per second, {N_ENVS} envs in one vector env (Mixtral, B=8, W=16)",
        value=N_ENVS / float(np.median(steps)),
        unit="1/s",
        baseline=1.0 / float(np.median(single)),
        baseline_name="one env",
    )


def condition_rates() -> Iterator[BenchRow]:
    """Windows per second where every copy has its own machine, against one machine for all.

    Episodes are short, so that the price of drawing and pricing machines is in it.
    """
    import gymnasium as gym

    seconds: dict[str, float] = {}
    for name in ("fix", "rand", "hidden", "drift"):
        venv = gym.make_vec(
            "NDPPlacement-v0", num_envs=N_ENVS, vectorization_mode="vector_entry_point",
            conditions=name, max_windows=16,
        )  # fmt: skip
        venv.reset(seed=0)
        venv.action_space.seed(0)
        actions = [venv.action_space.sample() for _ in range(4)]
        venv.step(actions[0])
        seconds[name] = float(np.mean([_clock_s(partial(venv.step, a)) for a in actions * 12]))
        if name != "fix":
            yield BenchRow(
                name=f"windows per second, {N_ENVS} envs, conditions {name} (bundled recording)",
                value=N_ENVS / seconds[name],
                unit="1/s",
                baseline=N_ENVS / seconds["fix"],
                baseline_name="fix",
            )


def step_overhead() -> BenchRow:
    """Seconds of one unwrapped step outside the kernel, beside those inside."""
    import gymnasium as gym

    from ndp_gym import kernel

    with _mixtral_file() as kwargs, _timed(kernel, "run_lanes") as spent:
        env = gym.make("NDPPlacement-v0", **kwargs).unwrapped
        inside = []

        def after() -> None:
            inside.append(spent[0])

        steps = _single_steps(env, after)
    kernel_s = np.diff(inside)
    outside = np.array(steps[1:]) - kernel_s
    return BenchRow(
        name="one step outside the kernel (Mixtral, B=8, W=16)",
        value=float(np.median(outside)) * 1e6,
        unit="us",
        baseline=float(np.median(kernel_s)) * 1e6,
        baseline_name="inside the kernel",
    )


def _single_steps(env: Any, after: Callable[[], None] = lambda: None) -> list[float]:
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(8)]
    env.step(actions[0])
    seconds = []
    for i in range(200):
        started = time.perf_counter()
        truncated = env.step(actions[i % 8])[3]
        seconds.append(time.perf_counter() - started)
        after()
        if truncated:
            env.reset()
    return seconds


def large_file() -> Iterator[BenchRow]:
    """Opening and stepping a 10 GB recording, in a process of its own."""
    from ndp_gym.bench_large import write_large

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        size = write_large(path)
        open_s, anonymous_bytes = _in_process(
            "from ndp_gym.bench_large import step_large; step_large(sys.argv[1])", str(path)
        )
    name = f"{size / 1e9:.1f} GB recording"
    yield BenchRow(name=f"{name}, open", value=open_s * 1e3, unit="ms")
    yield BenchRow(
        name=f"{name}, anonymous memory after 50 windows", value=anonymous_bytes / 1e6, unit="MB"
    )


def start_up() -> Iterator[BenchRow]:
    """Importing the package, and the first window of a process: warm and cold compile cache."""
    clock = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    bare = _in_process(clock.format("import gymnasium"))[0]
    value = _in_process(clock.format("import ndp_gym"))[0]
    yield BenchRow(
        name="import ndp_gym",
        value=value,
        unit="s",
        baseline=bare,
        baseline_name="import gymnasium",
    )
    first = clock.format("from ndp_gym.bench_large import first_window; first_window()")
    with tempfile.TemporaryDirectory() as folder:
        cold = _in_process(first, NUMBA_CACHE_DIR=folder)[0]
        warm = _in_process(first, NUMBA_CACHE_DIR=folder)[0]
    yield BenchRow(
        name="first window of a process, compiled before",
        value=warm,
        unit="s",
        baseline=cold,
        baseline_name="first window, nothing compiled",
    )


def cache_replay() -> Iterator[BenchRow]:
    """LRU of `replay_cache` beside libCacheSim (extra ``bench``) on the same requests."""
    from ndp_gym.replay import replay_cache

    trace = random_trace(
        presets.model("deepseek-v2-lite"), n_requests=16, n_prompt=64, n_decode=448
    )
    capacity = 256
    stats = replay_cache(trace, "lru", capacity=capacity)
    seconds = _best_s(lambda: replay_cache(trace, "lru", capacity=capacity))
    other = _libcachesim_rate(trace, capacity, stats.hits)
    yield BenchRow(
        name="replay_cache LRU requests per second",
        value=stats.requests / seconds,
        unit="1/s",
        baseline=other,
        baseline_name="libCacheSim, equal hits" if other else "libCacheSim is not installed",
    )


def _libcachesim_rate(trace: RoutingTrace, capacity: int, hits: int) -> float | None:
    """Requests per second of libCacheSim's LRU; it must count the same hits."""
    try:
        import libcachesim
    except ImportError:
        return None
    offsets = np.arange(trace.n_layers)[:, None] * trace.n_experts
    keys = (trace.expert_ids.astype(np.int64) + offsets).ravel().tolist()
    requests = [libcachesim.Request(obj_id=key + 1, obj_size=1) for key in keys]

    def replay() -> int:
        cache = libcachesim.LRU(cache_size=capacity)
        return sum(map(cache.get, requests))

    counted = replay()
    if counted != hits:
        raise RuntimeError(f"libCacheSim must count the same hits: {counted} against {hits}")
    return len(keys) / _best_s(replay)


def _plans(lanes: Lanes, n: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Random plans: a tenth of the experts in HBM, mixed narrow widths."""
    rng = np.random.default_rng(1)
    shape = (lanes.n_lanes, *lanes.shape)
    return [
        (
            (rng.random(shape) > 0.1).astype(np.uint8),
            rng.choice(np.array([4, 3, 2], np.uint8), shape),
        )
        for _ in range(n)
    ]


@contextmanager
def _mixtral_file() -> Iterator[dict[str, Any]]:
    """Environment arguments for a random recording in the shape of Mixtral."""
    model = presets.model("mixtral-8x7b")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixtral.safetensors"
        random_trace(model, n_requests=96, n_prompt=128, n_decode=256).save(path)
        yield {
            "trace": str(path),
            "model": model.name,
            "system": SYSTEM,
            "batch_size": BATCH_SIZE,
            "window": WINDOW,
        }


@contextmanager
def _timed(module: Any, name: str) -> Iterator[list[float]]:
    """Seconds spent so far in ``module.name``, called from one thread, as a list of one."""
    spent = [0.0]

    def timed(function: Callable[..., object], *args: Any) -> None:
        spent[0] += _clock_s(lambda: function(*args))

    with _replaced(module, name, timed):
        yield spent


@contextmanager
def _replaced(module: Any, name: str, wrapper: Callable[..., None]) -> Iterator[None]:
    """Call ``wrapper(function, *args)`` in place of ``module.name``."""
    function = getattr(module, name)
    setattr(module, name, partial(wrapper, function))
    try:
        yield
    finally:
        setattr(module, name, function)


def _best_s(function: Callable[[], object], n: int = 20) -> float:
    return min(_clock_s(function) for _ in range(n))


def _clock_s(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _in_process(code: str, *args: str, **environment: str) -> list[float]:
    """The numbers that ``code`` prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"benchmark process failed: {done.stderr.strip()[-500:]}")
    return [float(word) for word in done.stdout.split()]
