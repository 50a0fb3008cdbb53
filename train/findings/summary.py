"""The short answers on top of ``docs/findings.md``, as sentences made from the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from train.findings.measure import (
    BATCH_SIZES,
    BUDGETS,
    HBM_BUDGET,
    HBM_ROWS,
    SYSTEMS,
    Found,
    Verdict,
    family,
)
from train.findings.necessity import SYSTEM, Necessity
from train.findings.tables import table
from train.findings.words import TIE, differs, joined, listed, main_term, percent, times


def winners_table(found: Sequence[Found]) -> Iterator[str]:
    """Who wins how often, by system and budget."""
    rows = []
    for system in SYSTEMS:
        here = [f for f in found if f.system == system]
        counts = [
            Counter(family(v.winner["policy"]) for v in _verdicts(here, b) if v.winner)
            for b in BUDGETS
        ]
        rows.append([f"`{system}`", *map(listed, counts)])
    yield from table(("system", *(f"wins at ΔNLL ≤ {b:g} nats" for b in BUDGETS)), rows)


def short_answers(found: Sequence[Found], necessity: Sequence[Necessity]) -> Iterator[str]:
    """One bullet per question of the page."""
    for budget in BUDGETS:
        yield _who_wins(_verdicts(found, budget), budget)
    every = [v for budget in BUDGETS for v in _verdicts(found, budget) if v.winner]
    yield _baselines(every)
    yield from _random_wins(found)
    yield _what_explains(every)
    yield _clairvoyance(every)
    yield from _prompts(found)
    yield _unnecessary(necessity, every)


def _verdicts(found: Sequence[Found], budget: float) -> list[Verdict]:
    return [v for f in found for v in f.verdicts if v.budget == budget]


def _who_wins(verdicts: Sequence[Verdict], budget: float) -> str:
    counts = Counter(family(v.winner["policy"]) for v in verdicts if v.winner)
    leads = [v.lead.value for v in verdicts if v.lead]
    ties = sum(lead < TIE for lead in leads)
    return (
        f"**Who wins at ΔNLL ≤ {budget:g} nats** ({len(verdicts)} conditions): {listed(counts)}. "
        f"The lead over the next policy is {percent(median(leads))} % in the median and "
        f"{percent(max(leads))} % at most; {ties} are ties (below {percent(TIE)} %)."
    )


def _baselines(verdicts: Sequence[Verdict]) -> str:
    far4 = [v.winner["speedup_vs_all_far4"] or 0.0 for v in verdicts if v.winner]
    fitting = [v for v in verdicts if v.hbm]
    good = [v for v in fitting if v.hbm and (v.hbm["delta_nll_nats"] or 0.0) <= v.budget]
    losses = [v.hbm["delta_nll_nats"] or 0.0 for v in fitting if v.hbm]
    text = (
        f"**Against the baselines**: the winner is {times(min(far4))} to {times(max(far4))} times "
        f"as fast as `all_far4` (median {times(median(far4))}). All experts in HBM fit in "
        f"{len(fitting)} of {len(verdicts)} cases and meet the quality budget in {len(good)}"
    )
    if fitting and not good:
        text += f": they lose {min(losses):.2f} to {max(losses):.2f} nats"
    return f"{text}."


def _random_wins(found: Sequence[Found]) -> Iterator[str]:
    """Why the control may be the fastest within a budget although a ranking beats it."""
    n_wins, over = 0, []
    for f in found:
        rows = {row["policy"]: row for row in f.rows}
        for v in f.verdicts:
            if v.winner and v.winner["policy"] == "random:bits=3" and main_term(v):
                n_wins += 1
                loss = rows["ema:bits=3"]["delta_nll_nats"] or 0.0
                if loss > v.budget:
                    speed = rows["ema:bits=3"]["tokens_per_s"] or 0.0
                    over.append((speed / (v.winner["tokens_per_s"] or 1.0), loss))
    if over:
        ratios, losses = zip(*over, strict=True)
        yield (
            f"**Where `random` wins** ({n_wins} cases that are no ties), the quality budget "
            f"decides in {len(over)}, not the placement: `ema` at the same widths sends more "
            f"tokens to its 3-bit copies in HBM, is {times(min(ratios))} to {times(max(ratios))} "
            f"times as fast, and loses {min(losses):.4f} to {max(losses):.4f} nats: too many."
        )


def _what_explains(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(term for v in verdicts if (term := main_term(v)))
    return (
        f"**What explains it**: over the {sum(counts.values())} leads that are no ties, the part "
        f"of `ndp-gym explain` that saves most is: {listed(counts)}."
    )


def _clairvoyance(verdicts: Sequence[Verdict]) -> str:
    ratios = [
        (v.oracle["tokens_per_s"] or 0.0) / (v.winner["tokens_per_s"] or 1.0)
        for v in verdicts
        if v.oracle and v.winner
    ]
    return (
        f"**Knowing the future** makes the fastest clairvoyant policy {times(median(ratios))} "
        f"times as fast as the winner in the median ({times(min(ratios))} to "
        f"{times(max(ratios))}). It is no upper bound."
    )


def _prompts(found: Sequence[Found]) -> Iterator[str]:
    """Where prefill context helps, over controls that differ in nothing but the ranking."""
    for policy in ("prefill_topk", "context_aware"):
        for control in ("noise", "popularity"):
            told = _by_batch(found, policy, control)
            if told:
                yield (
                    f"**Prefill context**, `{policy}` shown prompts instead of {control}: "
                    f"{'; '.join(told)}."
                )


def _by_batch(found: Sequence[Found], policy: str, control: str) -> list[str]:
    """One phrase per kind of batch: on how many conditions which verdict holds, and for whom."""
    told = []
    for single in (True, False):
        here = [
            (f.title, f.prefill[policy, control])
            for f in found
            if (policy, control) in f.prefill and (f.batch_size == 1) == single
        ]
        if not here:
            continue
        signs = {sign: [t for t, r in here if differs(r) == sign] for sign in (1, 0, -1)}
        nats = median(r.nats for _, r in here)
        phrase = (
            f"at batch {'1' if single else f'2 to {max(BATCH_SIZES)}'} faster in {len(signs[1])} "
            f"of {len(here)}, slower in {len(signs[-1])}, median "
            f"x {times(median(r.value for _, r in here))}"
        )
        if abs(nats) >= 0.001:
            phrase += f" and ΔNLL {nats:+.3f}"
        never = sorted({t for t, _ in here} - set(signs[1]))
        told.append(phrase + (f" (never faster on {joined(never)})" if never else ""))
    return told


def _unnecessary(found: Sequence[Necessity], verdicts: Sequence[Verdict]) -> str:
    """What a whole GPU holds, against what is enough."""
    loose = BUDGETS[0]
    needless = [n for n in found if (s := n.enough[loose]) is not None and s <= n.gpu_share]
    shares = sorted({n.enough[loose] or 0.0 for n in needless}) or [0.0]
    whole = [n for n in found if n.gpu_share >= 1]
    wins = sum(v.winner is not None and v.winner["policy"] in HBM_ROWS for v in verdicts)
    return (
        f"**Where placement is unnecessary**: on `{SYSTEM}` with all of its GPU's memory. "
        f"{len(whole)} of {len(found)} models ({joined(n.title for n in whole)}) fit at 16 bit; "
        f"at ΔNLL ≤ {loose:g} nothing needs to stay on the far device once HBM holds "
        f"{times(shares[0])} to {times(shares[-1])} of the 16-bit bytes, and the GPU holds that "
        f"for {joined(n.title for n in needless) or 'none'}. All other tables give HBM "
        f"{HBM_BUDGET:g}, which stands for larger models or a shared GPU; there, rows with all "
        f"experts in HBM win {wins} of {len(verdicts)} cases."
    )
