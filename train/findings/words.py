"""Numbers of findings as text: cells of tables and the sentence that says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ndp_gym.results import Row
from train.findings.measure import Interval, Ratio, Verdict

NOTHING = "-"
TIE = 1.01  # a lead below is called a tie
MATTERS = 1.02  # a ratio nearer to 1 is called no difference
SHOWN_SHARE = 0.2  # terms below this share of the difference are left out


def rate(value: float | None) -> str:
    """Tokens per second with three digits, or a dash."""
    return NOTHING if value is None else f"{float(f'{value:.3g}'):g}"


def spread(interval: Interval | None, text: Callable[[float], str]) -> str:
    """` (low..high)`, or nothing where there is no interval."""
    return "" if interval is None else f" ({text(interval[0])}..{text(interval[1])})"


def times(value: float) -> str:
    """A ratio with two decimals."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """A ratio as the percentage above 1."""
    return f"{100 * (value - 1):.1f}"


def listed(counts: Counter[str]) -> str:
    """`a 3, b 1`, the most frequent first."""
    return ", ".join(f"{name} {n}" for name, n in counts.most_common()) or "none"


def joined(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = list(items) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def several(n: int, thing: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def differs(ratio: Ratio) -> int:
    """1 where the first is faster, -1 where it is slower, 0 where that cannot be told.

    A difference of less than 2 %, or an interval with 1 in it, cannot be told.
    """
    low, high = ratio.ci95 or (ratio.value, ratio.value)
    return int(ratio.value >= MATTERS and low > 1) - int(ratio.value <= 1 / MATTERS and high < 1)


def why(verdict: Verdict) -> str:
    """What the winner's lead over the next policy is made of, in one sentence."""
    winner, runner, found = verdict.winner, verdict.runner, verdict.why
    if winner is None or runner is None or found is None or verdict.lead is None:
        return NOTHING
    if verdict.lead.value < TIE:
        return "a tie"
    total = float(found.difference)
    terms = sorted(found.terms.items(), key=lambda item: -abs(item[1]))
    shown = [
        f"{_fact(name, winner, runner)}: {_ms(float(value))}"
        for name, value in terms
        if abs(float(value)) >= SHOWN_SHARE * abs(total)
    ]
    return f"{'; '.join(shown)}; all: {_ms(total)}"


def main_term(verdict: Verdict) -> str | None:
    """The term that makes the winner faster most, ``None`` for ties."""
    if verdict.why is None or verdict.lead is None or verdict.lead.value < TIE:
        return None
    return min(verdict.why.terms.items(), key=lambda item: item[1])[0]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:+.2f} ms"


def _fact(term: str, ours: Row, theirs: Row) -> str:
    """A term with the numbers of both rows behind it, the winner's first."""

    def pair(text: Callable[[Row], str]) -> str:
        return f"{text(ours)} against {text(theirs)}"

    def busy(name: str) -> Callable[[Row], str]:
        return lambda row: f"{100 * float(row[name] or 0):.0f}"  # type: ignore[literal-required]

    facts = {
        "bits": lambda: f"bits {pair(_bits)}",
        "hits": lambda: f"work, hits {pair(busy('hit_rate'))} %",
        "overlap balance": lambda: f"overlap, far device busy {pair(busy('far_busy'))} %",
        "link": lambda: f"link busy {pair(busy('link_busy'))} %",
        "migration": lambda: f"waiting for copies, {pair(_migrated)} GB moved",
    }
    return facts.get(term, lambda: term)()


def _bits(row: Row) -> str:
    return f"{row['mean_bits']:.1f}"


def _migrated(row: Row) -> str:
    return f"{(row['migration_bytes'] or 0) / 1e9:.1f}"
