"""`NDPPlacementEnv`: the environment as Gymnasium sees it; its docstring is the data sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from ndp_gym.budget import HbmBudget
from ndp_gym.conditions import Conditions
from ndp_gym.episodes import Episodes
from ndp_gym.inputs import ModelLike, QualityLike, SystemLike, TraceLike
from ndp_gym.render import placement_text
from ndp_gym.schedule import Scheduling

__all__ = ["NDPPlacementEnv"]

Observation = dict[str, NDArray[np.float32]]


class NDPPlacementEnv(gym.Env[Any, Any]):
    """Decide where the experts of a Mixture-of-Experts model live, and at how many bits.

    ## Description

    A language model decodes up to `batch_size` requests at once. In each of its L routed layers
    every token uses K of E experts. They do not fit in GPU memory (HBM): most live on a far memory
    behind a link, which may compute near its data. One step is one **decode window** of `window`
    decode steps. Before it the agent says which experts sit in HBM and at how many bits each is
    served; then recorded routing is replayed with the clock running. GPU and far device work in
    parallel, and a layer takes as long as the slower one. Copies into HBM use the link time that is
    left over, and an expert serves from HBM only once its last byte arrived. Fewer bits are faster
    and worse. What is hot changes with the requests.

    What an episode runs under may be drawn anew every time: how many requests at once, how much
    HBM, which machine, which requests first; and the machine that runs may be slower than the one
    the agent is told about, from the start or for a while (see `conditions` under Arguments).

    Everything comes from a recording and a cost model, so equal seeds and actions give equal
    episodes, `info` included.

    ## Action Space

    `action` names the encoding; n = L * E experts, in the order layer 0 expert 0, 0 1, ...

    | action | space | meaning |
    |---|---|---|
    | `"scores"` | `Box(-1, 1, (n + 4,))` | a priority per expert, then four levels; every action fits the budget |
    | `"placement"` | `MultiDiscrete([2 * NB] * n)` | one (tier, bits) pair per expert: HBM at each of the NB stored widths, widest first, then far; a plan over budget is repaired, see `info["n_repaired"]` |
    | `"knobs"` | `Box(-1, 1, (8,))` | steers the `balance` planner; 0 is its default |

    Numbers outside [-1, 1] are clipped; nan is an error. The levels of `"scores"`:

    | index | level | -1 | 1 |
    |---|---|---|---|
    | n | fill: share of the HBM budget to use | 0 | all |
    | n + 1 | width in HBM | narrowest | widest |
    | n + 2 | width on the far device | narrowest | widest |
    | n + 3 | keep: added to the priority of experts that the last plan had in HBM | 0 | 1 |

    Between two stored widths the experts of higher priority get the wider one. The knobs multiply
    gpu_factor, far_factor (by up to 2), price, migration_cap (4), hysteresis, min_gain,
    prefill_tokens (8) and the planner's memory of past windows (4) by that power.

    ## Observation Space

    A `Dict` of flat float32 arrays with finite bounds derived from the specs; all lower bounds are 0.
    Expert e of layer l stands at l * E + e, as in actions; n = L * E.

    | key | shape | observation | unit | max |
    |---|---|---|---|---|
    | `prefill_load` | (n,) | load expected from the prompts of the live requests | tokens per decode step | batch_size |
    | `last_load` | (n,) | load in the last window | tokens per decode step | batch_size |
    | `ema_load` | (n,) | exponential average of it, weight 0.3 for the last window | tokens per decode step | batch_size |
    | `gate_share` | (n,) | share of the layer's squared gate weights, averaged likewise | - | 1 |
    | `tier` | (n,) | 0 in HBM, 1 far | - | 1 |
    | `bitwidth` | (n,) | width that serves now; 0 before the first plan | bit | 16 |
    | `in_flight` | (n,) | 1 where a copy to HBM has been ordered and has not arrived | - | 1 |
    | `layer` | (5 L,) | per layer GPU, far device, link, stalled: seconds per decode step of the last window; share of routed tokens served from HBM | s, - | one layer's longest step; 1 |
    | `context` | (17,) | `ndp_gym.policy.CONTEXT_NAMES`: HBM budget (bytes, share), batch size, window, nominal speeds of GPU, far device and link, quality weight, live requests, requests admitted since the last plan, their mean context, tokens generated, bytes in flight, bytes copied on demand per decode step of the last window | SI | from the specs |

    Nothing of the future is in it: no routing, length or arrival that has not happened.

    ## Rewards

    `log(T_ref / T) - quality_weight * (D - D_ref)`: T are the window's decode seconds and D its loss
    in nats per token (ΔNLL). The reference replays the same tokens with all experts far at 4 bit (or
    the nearest stored width), so that 0 means "as good as that" and +0.01 about 1 % more tokens per
    second at equal quality. `quality_weight` is in 1/nat: `"speed"` 1, `"balanced"` 4, `"quality"`
    16, or a number. Prefill and the first load of HBM are not part of it, but of `info["ttft_s"]`.

    `info` names the terms (`reward_throughput`, `reward_quality` and `reward_energy`, minus joules
    per token, which has weight 0) and repeats them as `reward_vector` for multi-objective agents.
    Beside them stand tokens, `decode_s`, `load_s`, `prefill_s`, `delta_nll_nats`, `hit_rate`, bytes
    by kind, `energy_j`, `n_repaired`, and per batch slot `admitted` (its request started with this
    window) and `ttft_s` (prefills up to its own and the first load; 0 where none was admitted).

    ## Starting State

    HBM is empty; the requests of the split are permuted by the environment's generator and the first
    `batch_size` are prefilled. `reset(options={"requests": [...]})` runs the given rows of the
    request table in the given order instead. `info["condition"]` has what was drawn and may be
    known, `info["hidden"]` what the agent is not told, for analysis.
    A recording with fewer than 16 conversations has no train and val split: give `split="test"`.

    ## Episode End

    1. Truncation: all requests have ended.
    2. Truncation: `max_windows` windows have passed.

    It never terminates.

    ## Arguments

    ```python
    import gymnasium as gym
    import ndp_gym

    env = gym.make("NDPPlacement-v0", hbm_budget=0.05, quality_weight="quality")
    ```

    | argument | default | meaning |
    |---|---|---|
    | `trace` | `None` | path of a recording; `None`: the bundled one |
    | `model` | `None` | name of a model preset; `None`: the one that the recording names |
    | `system` | `None` | name of a system preset; `None`: `h100_cxl_seed_ndp` |
    | `batch_size` | `8` | requests decoded at once |
    | `window` | `16` | decode steps per plan |
    | `hbm_budget` | `0.10` | HBM for experts: bytes (int), share of all routed-expert bytes at 16 bit (float), `"auto"` (what KV leaves over), or `[low, high]`: a share drawn log-uniformly per episode |
    | `split` | `"train"` | requests of `"train"`, `"val"` or `"test"` |
    | `scheduling` | `"continuous"` | `"continuous"` batching, or `"static"`: refill when all slots have ended |
    | `max_windows` | `64` | windows per episode; `None`: until the requests have ended |
    | `action` | `"scores"` | encoding: `"scores"`, `"placement"`, `"knobs"` |
    | `quality_weight` | `"balanced"` | price of quality: a name or a number in 1/nat |
    | `quality` | `None` | path of measured errors (`ndp-gym quality measure`); `None`: those of the system's format |
    | `conditions` | `None` | what every episode draws: `"fix"` (or `None`: nothing), `"rand"`, `"hidden"`, `"drift"` |
    | `render_mode` | `None` | `"ansi"`: `render()` returns the placement as text |

    All arguments may be plain JSON, so that `env.spec.to_json()` names the environment exactly;
    recordings, specs, error models and `ndp_gym.conditions.Conditions` may also be given as objects.

    What a preset of `conditions` draws takes the place of the argument:

    | conditions | id | every episode draws |
    |---|---|---|
    | `"fix"` | `NDPPlacement-v0` | the order of its requests |
    | `"rand"` | `NDPPlacementRand-v0` | batch size 1, 2, 4, 8 or 16; a share of .03 to .2 as HBM budget; link .48 to 2 and far device .49 to 1.95 times as fast; up to 4096 tokens before every request; quality weight 1, 4 or 16; which domains come first |
    | `"hidden"` | `NDPPlacementHidden-v0` | the same, and GPU, far device and link run at .4 to 1 of the speed that the agent is told |
    | `"drift"` | `NDPPlacementDrift-v0` | as `"rand"`; then, each with a chance of one half and for 16 to 48 windows: GPU or far device throttled, the link or HBM shared; and requests that come domain by domain |

    The agent is told speeds, budget and batch size, HBM taken by a co-tenant included. Of slower
    devices it learns from `layer` alone; `T_ref` is that of the machine that runs.

    ## Vectorized environment

    ```python
    envs = gym.make_vec("NDPPlacement-v0", num_envs=64, vectorization_mode="vector_entry_point")
    ```

    steps all copies in one call of the simulator and gives each what the single environment would
    give it with seed `seed + i`. `autoreset_mode` is `"next_step"` (default), `"same_step"` or
    `"disabled"`.

    ## Version History

    * v0: initial version; unreleased, so it may still change (see CHANGELOG under *Model*).
    """  # noqa: E501

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        trace: TraceLike = None,
        model: ModelLike = None,
        system: SystemLike = None,
        batch_size: int = 8,
        window: int = 16,
        hbm_budget: HbmBudget | Sequence[float] = 0.10,
        split: str = "train",
        scheduling: Scheduling = "continuous",
        max_windows: int | None = 64,
        action: str = "scores",
        quality_weight: str | float = "balanced",
        quality: QualityLike = None,
        conditions: str | Conditions | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Open the recording and size the spaces; see the class for the arguments.

        Raises:
            ValueError: an argument is out of range, or recording, model and system do not agree.
            OSError: the recording cannot be read.
        """
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.episodes = Episodes(
            1,
            trace=trace,
            model=model,
            system=system,
            batch_size=batch_size,
            window=window,
            hbm_budget=hbm_budget,
            split=split,
            scheduling=scheduling,
            max_windows=max_windows,
            action=action,
            quality_weight=quality_weight,
            quality=quality,
            conditions=conditions,
        )
        self.observation_space = self.episodes.observation_space
        self.action_space = self.episodes.encoding.space
        self._needs_reset = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; ``options={"requests": [...]}`` chooses the requests and their order.

        Raises:
            ValueError: options are unknown or name requests that cannot run.
        """
        super().reset(seed=seed)
        info = self.episodes.reset(0, self.np_random, options)
        self._needs_reset = False
        return self._observe(), info

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply the plan behind ``action`` and replay one decode window.

        Raises:
            ResetNeeded: the episode has ended or not begun.
            ValueError: the action has the wrong shape or means nothing.
        """
        if self._needs_reset:
            raise ResetNeeded("the episode has ended or not begun: call reset()")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            shape = self.action_space.shape
            raise ValueError(f"action must have shape {shape}, got {action.shape}")
        stepped = self.episodes.step(action[None])
        truncated = bool(stepped.truncated[0])
        self._needs_reset = truncated
        info = {
            name: column.item() if column.ndim == 1 else column[0]
            for name, column in stepped.infos.items()
        }
        return self._observe(), float(stepped.rewards[0]), False, truncated, info

    def render(self) -> str | None:
        """The placement as text where ``render_mode`` is ``"ansi"``; see `ndp_gym.render`."""
        if self.render_mode is None:
            gym.logger.warn("render() was called without a render_mode; give render_mode='ansi'")
            return None
        return render_lane(self.episodes, 0)

    def _observe(self) -> Observation:
        return {name: array.reshape(-1) for name, array in self.episodes.lanes.observe().items()}


def check_render_mode(render_mode: str | None) -> None:
    """Raise ``ValueError`` for a render mode that does not exist."""
    modes = NDPPlacementEnv.metadata["render_modes"]
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be None or one of {modes}, got {render_mode!r}")


def render_lane(episodes: Episodes, lane: int) -> str:
    """The text of one lane's placement."""
    lanes = episodes.lanes
    state = lanes.simulator.get_state(lane)
    title = f"window {episodes.n_windows[lane]}, {lanes.schedule.generated[lane]} tokens"
    return placement_text(state.hbm_bits, state.far_bits, state.target_bits, title)
