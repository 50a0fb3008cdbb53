"""The seed paper (arXiv 2512.04476): its policy and three baselines on its simulated device.

One request at a time with a constant context. Times follow from hits per (token, layer) by the same
cost functions as everywhere; hit statistics are those of Mixtral-8x7B for both models, since no
Mixtral-8x22B recording is public.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ndp_gym import cost, presets
from ndp_gym.specs import MoESpec, SystemSpec
from ndp_gym.units import US
from ndp_gym.validation.hits import Ints
from ndp_gym.validation.recordings import MixtralHits, Recordings

CONTEXT = 1152
"""Tokens of context of every decode step: 128 in and half of 2048 out."""

PROMPT = 128
RESIDENT = {"8x7b": 4, "8x22b": 2}
"""fp16 experts per layer in HBM (arXiv 2512.04476 section 5.1)."""

MIGRATIONS = 0.27
"""pi, on-demand migrations per off-GPU hit of the MoNDE baseline: fitted to the seed's bars."""

HOBBIT_LATENCY_S = 10 * US
HOBBIT_RANK_2 = (0.34, 0.60)
"""Shares of rank-2 misses loaded at 16 and at 4 bit, the rest skipped (arXiv 2411.01433)."""


class Constants(NamedTuple):
    """The two numbers that were fitted to the seed's simulator."""

    far_efficiency: float
    migrations: float


FITTED = Constants(presets.far("seed_ndp").efficiency, MIGRATIONS)


class Seed(NamedTuple):
    """One of the two models on the seed's device, with its hit statistics.

    Attributes:
        model: The model.
        system: The seed's simulator; the far device's efficiency may be another.
        n_resident: Experts per layer in HBM.
        hits: Off-GPU hits at that residency.
        migrations: Share of (token, layer) with o off-GPU hits, j of them migrated, [3, 3].
    """

    model: MoESpec
    system: SystemSpec
    n_resident: int
    hits: MixtralHits
    migrations: npt.NDArray[np.float64]

    def with_far_efficiency(self, efficiency: float) -> Seed:
        """The same with another ``eta_n`` of the far device."""
        far = dataclasses.replace(self.system.far, efficiency=efficiency)
        return self._replace(system=dataclasses.replace(self.system, far=far))

    def step_s(self, layer_s: float) -> float:
        """Seconds of a decode step whose mean layer takes ``layer_s``."""
        return self.model.n_layers * layer_s + cost.lm_head_s(self.model, self.system.gpu)

    def layer_s(
        self, bits: int, n_far: npt.ArrayLike, n_copied: npt.ArrayLike = 0
    ) -> npt.NDArray[np.float64]:
        """Seconds of a layer at batch 1, elementwise over the numbers of experts.

        Args:
            bits: Width of the experts that the far device computes.
            n_far: Experts of the token that the far device computes.
            n_copied: Off-GPU experts that are copied at 16 bit and run on the GPU instead.
        """
        model, system = self.model, self.system
        far, copied = np.asarray(n_far), np.asarray(n_copied)
        on_gpu = model.top_k - far
        gpu = cost.gpu_experts_s(model, system, {16: on_gpu}, on_gpu)
        copies = cost.transfer_s(copied * self.expert_bytes16, system.link)
        sent = cost.activation_transfer_s(model, system.link, np.minimum(far, 1))
        branch = cost.far_branch_s(system, sent, far * cost.far_expert_s(model, system, bits, 1))
        return self.attention_s + cost.combine_s(system, gpu + copies, branch)

    @property
    def attention_s(self) -> float:
        """Seconds of attention and router of a layer."""
        return float(cost.attention_s(self.model, self.system.gpu, [CONTEXT])[0])

    @property
    def expert_bytes16(self) -> int:
        """Bytes of an expert at 16 bit."""
        return cost.expert_bytes(self.model, self.system.format, 16)

    def ours_step_s(self, bits: int) -> float:
        """Prefill-guided fp16 experts in HBM, the others at ``bits`` on the far device."""
        return self.step_s(_mean(self.hits.guided, lambda o: self.layer_s(bits, o)))

    def monde_seed_step_s(self) -> float:
        """The baseline fitted to the paper: static experts, some off-GPU hits migrate.

        A migrated expert is copied in the foreground, runs on the GPU and is not kept.
        """
        off, copied = np.tril_indices(3)
        times = self.layer_s(16, off - copied, copied)
        return self.step_s(float((self.migrations[off, copied] * times).sum()))

    def monde_rule_step_s(self) -> float:
        """The rule of arXiv 2405.18832, nothing resident: the best ``h`` of the experts migrate."""
        model, system = self.model, self.system
        each = float(cost.far_expert_s(model, system, 16, 1))
        moved = float(cost.transfer_s(self.expert_bytes16, system.link))
        read = float(cost.gpu_experts_s(model, system, {16: 1}, 1))
        n = model.top_k
        best = min(range(n + 1), key=lambda h: max(h * (moved + read), (n - h) * each))
        return self.step_s(float(self.layer_s(16, n - best, best)))

    def hobbit_step_s(self) -> float:
        """HOBBIT (arXiv 2411.01433) by means: LRU of fp16 experts, narrower rank-2 misses.

        Loading hides behind at most one layer of GPU time.
        """
        one, two = self.hits.lru_miss
        full, narrow = HOBBIT_RANK_2
        loaded = (one + two * (full + narrow / 4)) * self.expert_bytes16
        load = float(cost.transfer_s(loaded, self.system.link))
        hidden = float(self.layer_s(16, 0))
        return self.step_s(hidden + max(0.0, load - hidden) + (one + two) * HOBBIT_LATENCY_S)

    def all_hbm_step_s(self, bits: int) -> float | None:
        """Every expert in HBM at ``bits``, no far device; ``None`` where they do not fit."""
        widths = tuple(sorted({*self.system.stored_bits, bits}, reverse=True))
        system = dataclasses.replace(self.system, stored_bits=widths)
        n_experts = self.model.n_layers * self.model.n_experts
        n_bytes = n_experts * cost.expert_bytes(self.model, system.format, bits)
        if n_bytes > cost.auto_budget_bytes(self.model, system, [CONTEXT], 0):
            return None
        return cost.all_hbm_step_s(
            self.model, system, bits=bits, contexts=[CONTEXT], n_distinct=self.model.top_k
        )

    @property
    def prefill_s(self) -> float:
        """Seconds of the prompt, nothing resident yet."""
        return cost.prefill_s(self.model, self.system, PROMPT)

    @property
    def placement_s(self) -> float:
        """Seconds to load the resident experts once."""
        n_bytes = self.n_resident * self.model.n_layers * self.expert_bytes16
        return float(cost.transfer_s(n_bytes, self.system.link))

    def end_to_end_ratio(self, bits: int, n_out: int) -> float:
        """Time of the MoNDE baseline over ours for a whole request.

        Both pay prefill; only ours, whose experts depend on the prompt, pays for placing them.
        """
        ours = self.prefill_s + self.placement_s + n_out * self.ours_step_s(bits)
        return (self.prefill_s + n_out * self.monde_seed_step_s()) / ours

    def far_share(self) -> float:
        """Share of activations that the far device serves under the seed's policy."""
        return float(self.hits.guided.mean()) / self.model.top_k


def _mean(off: Ints, layer_s: Callable[[Ints], npt.NDArray[np.float64]]) -> float:
    """Mean of ``layer_s`` over all tokens and layers, by their number of off-GPU hits."""
    share = np.bincount(off.ravel()) / off.size
    return float((share * layer_s(np.arange(share.size))).sum())


def migration_pairs(off: Ints, migrations: float) -> npt.NDArray[np.float64]:
    """Share of (token, layer) with o off-GPU hits of which j migrate, [3, 3].

    Credit of ``migrations`` per off-GPU hit accumulates over tokens, layers and requests; each
    whole credit migrates one. With at most 1 per hit, no layer has more credit than hits.
    """
    hits = off.ravel()
    due = np.floor(migrations * np.cumsum(hits) + 1e-12).astype(np.int64)
    copied = np.diff(due, prepend=0)
    return np.asarray(np.bincount(hits * 3 + copied, minlength=9).reshape(3, 3) / hits.size)


def seed(
    recordings: Recordings,
    size: str,
    constants: Constants = FITTED,
    system_name: str = "seed_sim",
) -> Seed:
    """Mixtral of ``size`` (8x7b or 8x22b) on the seed's device, or on another system preset."""
    n_resident = RESIDENT[size]
    found = recordings.mixtral_hits[n_resident]
    case = Seed(
        presets.model(f"mixtral-{size}"),
        presets.system(system_name),
        n_resident,
        found,
        migration_pairs(found.static, constants.migrations),
    )
    return case.with_far_efficiency(constants.far_efficiency)


def fitted_rows(cases: Mapping[str, Seed]) -> dict[str, float]:
    """The rows that chose ``eta_n`` and ``pi``, by target id; ``cases`` by size of Mixtral."""
    rows: dict[str, float] = {}
    for size, case in cases.items():
        monde = case.monde_seed_step_s()
        for bits in (3, 2):
            ours = case.ours_step_s(bits)
            rows[f"seed/decode-ratio/{size}/{bits}bit"] = monde / ours
            if size == "8x22b":
                rows[f"seed/tokens-per-s/8x22b/ours-{bits}"] = 1 / ours
                rows["seed/tokens-per-s/8x22b/monde"] = 1 / monde
    return rows


def rows(recordings: Recordings) -> Mapping[str, float]:
    """Every row of the group, by target id."""
    cases = {size: seed(recordings, size) for size in RESIDENT}
    found = fitted_rows(cases)
    for size, case in cases.items():
        rule = case.monde_rule_step_s()
        for bits in (3, 2):
            key = f"{size}/{bits}bit"
            found[f"seed/decode-ratio-monde-rule/{key}"] = rule / case.ours_step_s(bits)
            found[f"seed/end-to-end-low/{key}"] = case.end_to_end_ratio(bits, 512)
            found[f"seed/end-to-end-high/{key}"] = case.end_to_end_ratio(bits, 2048)
        found[f"seed/hobbit-ratio/{size}/2bit"] = case.hobbit_step_s() / case.ours_step_s(2)
    return found


def far_latency_ratio(bits: int) -> float:
    """Time of a 16-bit expert on the far device over that of a ``bits``-wide one, same hits."""
    model, system = presets.model("mixtral-8x7b"), presets.system("seed_sim")
    wide, narrow = (float(cost.far_expert_s(model, system, b, 1)) for b in (16, bits))
    return wide / narrow


def known_better(recordings: Recordings) -> dict[str, dict[str, float | None]]:
    """Tokens/s of the seed's rows beside all experts in HBM; ``None`` where they do not fit."""
    table: dict[str, dict[str, float | None]] = {}
    for size in RESIDENT:
        for system_name in ("seed_sim", "h100_seed_ndp"):
            case = seed(recordings, size, FITTED, system_name)
            column = f"{size}, {system_name}"
            steps: dict[str, float | None] = {
                "MoNDE as fitted to the paper": case.monde_seed_step_s(),
                "seed, 3 bit": case.ours_step_s(3),
                "seed, 2 bit": case.ours_step_s(2),
            }
            for bits in (8, 4, 3):
                steps[f"all experts in HBM, {bits} bit"] = case.all_hbm_step_s(bits)
            for name, step in steps.items():
                table.setdefault(name, {})[column] = None if step is None else 1 / step
    return table
