"""Prompts of the recording, cut from held-out text; knows nothing of the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.minimoe.tokenizer import SEPARATOR

MIN_PROMPT, MAX_PROMPT = 128, 512
Stream = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens [S] to prefill, the domain they end in, and the one they begin in if it differs."""

    tokens: npt.NDArray[np.int64]
    domain: str
    opening: str | None


class PromptSource:
    """Reads each domain's held-out stream from front to end, so no text is used twice."""

    def __init__(self, held_out: Mapping[str, Stream], rng: np.random.Generator) -> None:
        """Start at the front of every domain's stream; ``rng`` draws lengths and mixtures."""
        self.domains = list(held_out)
        self._held_out = held_out
        self._used = dict.fromkeys(held_out, 0)
        self._rng = rng

    def draw(self, domain: str, *, mixed: bool) -> Prompt:
        """The next prompt that ends in ``domain``, its length uniform in 128..512 tokens.

        The first 30-70 % of a ``mixed`` prompt come from another domain, followed by a separator:
        it stands for a system prompt before the content.

        Raises:
            ValueError: When a domain's held-out text is used up.
        """
        length = int(self._rng.integers(MIN_PROMPT, MAX_PROMPT + 1))
        if not mixed:
            return Prompt(tokens=self._take(domain, length), domain=domain, opening=None)
        others = [d for d in self.domains if d != domain]
        opening = others[self._rng.integers(len(others))]
        first = self._take(opening, round(self._rng.uniform(0.3, 0.7) * length))
        rest = self._take(domain, length - len(first) - 1)
        tokens = np.concatenate((first, [SEPARATOR], rest))
        return Prompt(tokens=tokens, domain=domain, opening=opening)

    def _take(self, domain: str, n: int) -> npt.NDArray[np.int64]:
        start = self._used[domain]
        self._used[domain] += n
        if self._used[domain] > len(self._held_out[domain]):
            raise ValueError(f"held-out text of domain {domain!r} is used up")
        return self._held_out[domain][start : start + n].astype(np.int64)
