"""The public recordings that some rows need: where they are looked for, and what to get."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ndp_gym.importers import import_trace
from ndp_gym.trace import RoutingTrace
from ndp_gym.validation import hits

ENVIRONMENT = "NDP_GYM_SHARED_TRACES"


class PublicFile(NamedTuple):
    """A file of a public repository, and where it lies below the folder of recordings."""

    repository: str
    path: str
    below: str

    @property
    def text(self) -> str:
        """How a stranger finds it."""
        return f"{self.path} of github.com/{self.repository}"


MIXTRAL = PublicFile(
    "angerybob/HD-MoE @ 66b84d75",
    "expert_trace/mixtral/experts_<domain>_mixtral.json (8 domains)",
    "angerybob__HD-MoE/expert_trace/mixtral",
)
GPT_OSS = PublicFile(
    "BrianBoitano/nvmoe @ f895ad37",
    "traces/gptoss-all.tokens.jsonl",
    "BrianBoitano__nvmoe/traces/gptoss-all.tokens.jsonl",
)


class MissingRecordingError(LookupError):
    """A row needs a public recording that is not there; the message says which."""


class Recordings:
    """Public recordings below one folder, read and counted when a row first asks.

    The layout is ``owner__repository/path`` as in :data:`MIXTRAL`, files plain or gzipped.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Look below ``folder``; default: the environment variable, else ``../shared/traces``."""
        default = Path(__file__).resolve().parents[3] / "shared" / "traces"
        self.folder = Path(folder or os.environ.get(ENVIRONMENT) or default)

    def path(self, file: PublicFile) -> Path:
        """Where ``file`` is.

        Raises:
            MissingRecordingError: It is not below the folder.
        """
        plain = self.folder / file.below
        for found in (plain, plain.with_name(plain.name + ".gz")):
            if found.exists():
                return found
        raise MissingRecordingError(f"needs {file.text} as {file.below} below the recordings")

    def missing(self) -> list[PublicFile]:
        """The files that are not there."""
        absent = []
        for file in (MIXTRAL, GPT_OSS):
            try:
                self.path(file)
            except MissingRecordingError:
                absent.append(file)
        return absent

    @cached_property
    def mixtral_trace(self) -> RoutingTrace:
        """The eight MT-Bench files of Mixtral-8x7B as one trace."""
        return import_trace([self.path(MIXTRAL)]).trace

    @cached_property
    def gpt_oss_trace(self) -> RoutingTrace:
        """1,396 decode tokens of gpt-oss-120b."""
        return import_trace([self.path(GPT_OSS)]).trace

    @cached_property
    def mixtral_parts(self) -> list[hits.Part]:
        """The 64 requests of the Mixtral recording with enough decode tokens."""
        return hits.parts_of(self.mixtral_trace)

    @cached_property
    def mixtral_hits(self) -> dict[int, MixtralHits]:
        """Hit statistics with 4 and with 2 experts of each layer in HBM."""
        return {k: _mixtral_hits(self.mixtral_parts, k) for k in (4, 2)}

    def gpt_oss_distinct(self, batch: int) -> float:
        """Distinct experts per layer of ``batch`` tokens drawn from the gpt-oss recording."""
        return hits.closed_form_distinct(self.gpt_oss_trace, batch)


class MixtralHits(NamedTuple):
    """Off-GPU hits of one number of resident experts, token by token.

    Attributes:
        guided: With the experts that the request's prefill used most, [n, L].
        static: With the most popular ones over all decode parts, [n, L].
        lru_miss: Misses per (token, layer) of an LRU cache of that size, by rank.
    """

    guided: hits.Ints
    static: hits.Ints
    lru_miss: tuple[float, float]


def _mixtral_hits(parts: list[hits.Part], n_resident: int) -> MixtralHits:
    n_experts = 8
    guided = hits.prefill_guided(parts, n_experts, n_resident)
    static = hits.static(parts, hits.pooled_load(parts, n_experts), n_resident)
    one, two = hits.lru_misses(parts, n_resident)
    return MixtralHits(guided, static, (one / guided.size, two / np.size(guided)))
