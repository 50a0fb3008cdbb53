"""``docs/quality.md``: both parts in words and tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ndp_gym.provenance import git_commit, package_versions
from ndp_gym.quality import QualityModel
from ndp_gym.rows import LOW_MEAN_BITS
from train.closed_loop.bitmaps import BEST, DEFAULT, N_TOKENS, NOISE_SIZE, Measured, Sensitivity
from train.closed_loop.closed import MAX_WINDOWS, Loop
from train.closed_loop.maps import MEANS
from train.closed_loop.summary import (
    EXPLAINED,
    OVERALL,
    TOLERANCE,
    WITHIN,
    Verdict,
    is_close,
    lowest_trusted,
    threshold,
    with_square,
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything the page tells."""

    measured: Measured
    verdicts: Sequence[Verdict]
    sensitivity: Sensitivity
    loops: Sequence[Loop]
    system: str


def page(study: Study) -> str:
    """The whole page."""
    return "\n".join(_lines(study)).rstrip() + "\n"


def maps_csv(measured: Measured) -> str:
    """One line per bit map; ``first_text`` is the ΔNLL on the first text alone."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["stratum", "kind", "mean_bits", "nats", "error", "first_text", *_SHORT])
    for i, each in enumerate(measured.maps):
        values = [measured.nats[i], measured.errors[i], measured.first_text[i]]
        values += [measured.predicted[way][i] for way in _SHORT.values()]
        numbers = [f"{value:.5f}" for value in values]
        rows.writerow([each.stratum, each.kind, f"{each.mean_bits:.3f}", *numbers])
    return out.getvalue()


_SHORT = {"predicted_default": DEFAULT, "predicted_by_width": BEST}


def _lines(study: Study) -> Iterator[str]:
    versions = "; ".join(f"{name} {version}" for name, version in package_versions().items())
    yield "# Is the modeled loss true, and may recorded routing be replayed?"
    yield ""
    yield (
        f"Written by `python -m train.closed_loop` (commit {git_commit() or 'unknown'}; "
        f"{versions}). The bundled model (`traces/minimoe.md`) is the one model whose weights, "
        f"text and recording are all at hand: it is run with quantized experts, and what happens "
        f"stands beside what the library computes. Quantizer: `ndp_gym.quantizers` (clip search, "
        f"groups of 128; signs at 1 bit), experts only."
    )
    yield ""
    yield "## What not to conclude"
    yield ""
    yield _CAVEATS
    yield ""
    yield "## Predicted against measured loss"
    yield ""
    yield from _maps(study)
    yield ""
    yield "## Recorded against live routing"
    yield ""
    yield from _loops(study)


_CAVEATS = """\
- One model of 8.7 M parameters, trained for minutes, one quantizer, one seed. It says how the
  *forms* do (which ΔNLL orders allocations, how far replay can be trusted), not what a large model
  loses at 2 bits. Scales fitted here are scales of this model.
- Its routing is local because a *leaky router* was built in, not because models are. The router
  averages over four tokens, so it may change less under quantization than others do; GEMQ reports
  more than 40 % of tokens re-routed at 1.5 bits on Mixtral.
- Speeds are modeled (`minimoe-16b`, the default system); only routing and losses are measured.
- Texts are held-out prompts and the model's own answers; no task accuracy was measured."""


def _maps(study: Study) -> Iterator[str]:
    measured, (default, *_) = study.measured, study.verdicts
    equal = sum(m.stratum.startswith("mean") for m in measured.maps)
    made = sum(m.stratum == "policies" for m in measured.maps)
    yield (
        f"{len(measured.maps)} different bit maps: {equal} at exactly equal mean bits "
        f"({', '.join(f'{mean:g}' for mean in MEANS)}; random, by layer, by popularity, by "
        f"sensitivity), {made} that policies made on the recording (the width that served each "
        f"expert most), the rest uniform. Measured: next-token loss on the first {N_TOKENS} tokens "
        f"of {measured.n_texts} test prompts ({measured.n_tokens:,} predictions) above that at 16 "
        f"bits ({measured.base:.3f} nats); standard errors by bootstrap over prompts, median "
        f"{np.median(measured.errors):.4f} nats. Predicted: `ndp_gym.quality.delta_nll` with the "
        f"gate energy of the recorded prompts. Targets: Spearman >= {WITHIN} within every stratum, "
        f">= {OVERALL} overall, R2 >= {EXPLAINED} with one scale fitted on the other half of the "
        f"maps (the worse of both halves). *Factor* is the typical ratio between scaled prediction "
        f"and measurement."
    )
    yield ""
    strata = list(default.strata)
    columns = " | ".join(f"{name} bits" for name in strata)
    yield f"| prediction | scale | {columns} | overall | R2 | factor | met |"
    yield "|---" * (len(strata) + 6) + "|"
    for v in study.verdicts:
        ranks = " | ".join(f"{value:.2f}" for value in v.strata.values())
        met = ", ".join(
            name for name, ok in zip(("strata", "overall", "R2"), v.passes, strict=True) if ok
        )
        yield (
            f"| {v.way} | {v.scale:.2f} | {ranks} | {v.overall:.3f} | {v.explained:.2f} | "
            f"{v.factor:.2f} | {met or 'none'} |"
        )
    yield ""
    yield _WAYS
    yield ""
    yield from _answer(study)
    yield ""
    yield "![measured against predicted loss of all bit maps](img/quality_maps.svg)"
    yield ""
    yield from _sensitivities(study)
    yield ""
    yield from _uniform(study)
    yield ""
    yield "All maps: [quality_maps.csv](quality_maps.csv)."


_WAYS = f"""\
*default*: the format's errors, `kappa` 3 and the layer weights of `layer_weights` (2 for the first
four and the last two layers, else 1). *measured eps*: errors of this model's weights. *layers by
noise*: `MoESpec.layer_weights` from Gaussian noise of relative squared size {NOISE_SIZE:g} on one
layer's experts at a time (linearity theorem of HIGGS, arXiv 2411.17525). *{BEST}*: what each layer
alone loses at each width, put into `QualityModel.table`. Both use train prompts."""


def _answer(study: Study) -> Iterator[str]:
    by_way = {v.way: v for v in study.verdicts}
    (linear, square), explained = with_square(study.measured.predicted[DEFAULT], study.measured)
    default, best, noise = by_way[DEFAULT], by_way[BEST], by_way["layers by noise"]
    yield (
        f"- **Ranking.** The default's worst rank correlation at equal mean bits is "
        f"{min(default.strata.values()):.2f}, overall {default.overall:.3f}: it can be used to "
        f"compare allocations."
    )
    yield (
        f"- **Size.** One scale explains {default.explained:.0%} of the variance with the default "
        f"and {best.explained:.0%} with *{BEST}* (target {EXPLAINED:.0%}). What is missing is "
        f"mostly curvature: small losses are over-estimated, large ones under-estimated, whatever "
        f"the kind of map. D = {linear:.2f} T + {square:.2f} T^2 of the default prediction T, two "
        f"fitted numbers in place of one, explains {explained:.0%}. All layers together lose more "
        f"than the sum of each alone (table below), which is the same fact."
    )
    yield (
        f"- **Layers.** Noise on one layer's experts is no better guide to layer weights here than "
        f"the default (overall {noise.overall:.3f}): it misses what 1 bit does to the first "
        f"layers. Quantizing one layer after the other does better."
    )
    yield (
        f"- **Using it.** `QualityModel(kappa={QualityModel.kappa * best.scale:.1f}, table=...)` "
        f"takes such a table as it is: nats of layer l alone at b bits, over "
        f"{QualityModel.kappa:g} and the layer's weight, for every expert of the layer. The "
        f"presets keep the default: no model whose sizes they have was measured."
    )


def _sensitivities(study: Study) -> Iterator[str]:
    noise = np.maximum(study.sensitivity.noise, 0)
    yield (
        "Layer weights by noise: "
        + " ".join(f"{value:.2f}" for value in noise / noise.sum())
        + ". Nats that one layer loses at 1, 2 and 3 bits:"
    )
    yield ""
    n = len(noise)
    yield f"| bits | {' | '.join(f'layer {i}' for i in range(n))} | sum | all layers together |"
    yield "|---" * (n + 3) + "|"
    measured = study.measured
    for bits, column in ((1, -1), (2, -2), (3, -3)):
        alone = study.sensitivity.widths[:, column]
        joint = next(
            float(measured.nats[i])
            for i, m in enumerate(measured.maps)
            if m.stratum == "uniform" and m.bits.flat[0] == bits
        )
        cells = " | ".join(f"{value:.3f}" for value in alone)
        yield f"| {bits} | {cells} | {alone.sum():.3f} | {joint:.3f} |"


def _uniform(study: Study) -> Iterator[str]:
    measured = study.measured
    yield "Every expert at the same width, `kappa` 3 as it is:"
    yield ""
    yield "| bits | measured ΔNLL | default prediction | ratio |"
    yield "|---|---|---|---|"
    for i, each in enumerate(measured.maps):
        if each.stratum == "uniform":
            nats, predicted = measured.nats[i], measured.predicted[DEFAULT][i]
            yield (
                f"| {each.mean_bits:g} | {nats:.4f} ± {measured.errors[i]:.4f} | {predicted:.4f} | "
                f"{predicted / nats:.2f} |"
            )


def _loops(study: Study) -> Iterator[str]:
    yield (
        f"Each policy plans window by window (`{study.system}`, 8 slots, windows of 16 steps, the "
        f"first {MAX_WINDOWS} windows of the test requests). *Recorded*: the routing of the "
        f"recording, at 16 bits, whatever the policy does. *Live*: in every decode step the model "
        f"runs with the copies that serve in that step, prompts included, and its routing replaces "
        f"the recorded rows before the window is charged; the policy sees what it caused. Answers "
        f"are the *recorded* ones, which isolates re-routing, or its *own*, sampled with the "
        f"random numbers of the recording. At 16 bits the live loop returns the recording."
    )
    yield ""
    yield (
        "| policy | mean bits | tokens/s recorded | live, recorded answers | live, own answers | "
        "hit rate recorded | live, recorded answers | live, own answers | sets changed (own) | "
        "experts changed (own) | ΔNLL predicted | measured | holds |"
    )
    yield "|---" * 13 + "|"
    for row in study.loops:
        yield _loop(row)
    yield ""
    yield (
        f"Percentages are recorded over live. A row *holds* if hit rates agree within "
        f"{100 * TOLERANCE:.0f} points and tokens/s within {TOLERANCE:.0%} or half the row's own "
        f"95 % interval over all test requests (own answers: that of as few requests as were run). "
        f"*Sets changed*: (token, layer) pairs whose experts are not those recorded; with its own "
        f"answers the text is soon another one. Predicted: `kappa` 3, default layer weights."
    )
    yield ""
    yield "![error of replaying recorded routing over mean bits](img/quality_loop.svg)"
    yield ""
    yield from _conclusion(study.loops)


def _loop(row: Loop) -> str:
    nats, error = row.true_nats
    hits = ["-"] * 3
    if row.open.hit_rate > 0:
        hits = [f"{100 * s.hit_rate:.1f} %" for s in (row.open, row.forced, row.free)]
    return (
        f"| `{row.policy}` | {row.mean_bits:.2f} | {row.open.tokens_per_s:,.0f} | "
        f"{row.forced.tokens_per_s:,.0f} ({100 * row.speed_error:+.1f} %) | "
        f"{row.free.tokens_per_s:,.0f} ({100 * row.free_speed_error:+.1f} %) | "
        f"{' | '.join(hits)} | "
        f"{100 * row.forced_changed[0]:.0f} % ({100 * row.free_changed[0]:.0f} %) | "
        f"{100 * row.forced_changed[1]:.0f} % ({100 * row.free_changed[1]:.0f} %) | "
        f"{row.open.predicted_nats:.3f} | {nats:.3f} ± {error:.3f} | "
        f"{'yes' if is_close(row) else 'no'} |"
    )


def _conclusion(loops: Sequence[Loop]) -> Iterator[str]:
    failing = sorted((r for r in loops if not is_close(r)), key=lambda r: -r.mean_bits)
    names = ", ".join(f"`{r.policy}` ({r.mean_bits:.2f} bits)" for r in failing)
    wide = ", ".join(
        f"`{r.policy}` ({r.speed_error:+.1%})"
        for r in loops
        if is_close(r) and abs(r.speed_error) > TOLERANCE
    )
    forced = max(abs(r.speed_error) for r in loops)
    hits = max(abs(r.hit_error) for r in loops)
    most = max(loops, key=lambda r: r.forced_changed[0])
    yield (
        f"Most sets of experts change at few bits ({most.forced_changed[0]:.0%} of them with "
        f"`{most.policy}`), yet on the same answers recorded routing tells tokens/s within "
        f"{forced:.1%} and hit rates within {100 * hits:.1f} points: which token goes where "
        f"changes, how often each expert is used hardly does. Rows that do not hold: "
        f"{names or 'none'}. On recorded answers, beyond {TOLERANCE:.0%} but within their own "
        f"interval: {wide or 'none'}."
    )
    yield ""
    lowest = lowest_trusted(loops)
    yield (
        f"**Threshold.** Every row above {threshold(loops):.2f} mean bits holds; the one of fewest "
        f"bits that uses both tiers is `{lowest.policy}` ({lowest.mean_bits:.2f}). "
        f"`ndp_gym.rows.LOW_MEAN_BITS` is {LOW_MEAN_BITS:g}: rows at or below it are marked "
        f"`extrapolated`. It says that replay gives the right speed and hits there, nothing of "
        f"loss: predicted ΔNLL has its own limit, and is off by the factors above."
    )
