"""What a routing trace says about itself: model, source, licence, recorder, order of ids.

The JSON under one metadata key of the file; it knows neither rows nor files.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ndp_gym.trace_file import parse_json

SCHEMA_VERSION = 1
ID_ORDERS = ("router_rank", "ascending", "unknown")
PHASES_RECORDED = "recorded"
PREFILL_ROWS = 128
N_MISSING = "tokens_not_recorded"
"""Key of ``extra``: tokens of the requests whose routing the source does not hold."""
PHASES_ASSUMED = f"first {PREFILL_ROWS} tokens taken as prefill"


@dataclass(frozen=True, kw_only=True)
class TraceMetadata:
    """Facts about a recording, validated.

    Attributes:
        model: Name of the model as the source gives it.
        n_experts: Routed experts per layer E, 1..65536.
        top_k: Experts per token K, 1..E.
        preset: Name of the model preset that matches, or None.
        source: Where the recording comes from (file names, repository).
        licence: Licence of the recording.
        recorder: Program that recorded or imported it.
        id_order: ``router_rank`` (best expert first), ``ascending`` or ``unknown``.
        phases: ``recorded``, or what the prefill rows were taken to be.
        expert_bytes: Stored bytes of one expert per layer where the source knows them.
        layer_ids: The model's own numbers of the routed layers, where the source gives them.
        source_sha256: Hex digest per source file name (of the uncompressed content).
        tiled_from: Layers before ``tile_layers``, or None.
        extra: Further facts (JSON values), kept as they are.
    """

    model: str
    n_experts: int
    top_k: int
    preset: str | None = None
    source: str = "unknown"
    licence: str = "unknown"
    recorder: str = "unknown"
    id_order: str = "unknown"
    phases: str = PHASES_RECORDED
    expert_bytes: tuple[int, ...] | None = None
    layer_ids: tuple[int, ...] | None = None
    source_sha256: Mapping[str, str] = field(default_factory=dict)
    tiled_from: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("model", "source", "licence", "recorder", "phases"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        _check(
            "preset",
            self.preset,
            self.preset is None or isinstance(self.preset, str),
            "a text or null",
        )
        _check("n_experts", self.n_experts, _is_int(self.n_experts, 1, 2**16), "in 1..65536")
        _check(
            "top_k",
            self.top_k,
            _is_int(self.top_k, 1, self.n_experts),
            f"in 1..n_experts={self.n_experts}",
        )
        _check("id_order", self.id_order, self.id_order in ID_ORDERS, f"one of {ID_ORDERS}")
        for name, low in (("expert_bytes", 1), ("layer_ids", 0)):
            values = getattr(self, name)
            ok = values is None or (
                isinstance(values, tuple) and all(_is_int(v, low, 2**48) for v in values)
            )
            _check(name, values, ok, f"null or numbers in {low}..2**48")
        hashes = self.source_sha256
        ok = isinstance(hashes, Mapping) and all(
            isinstance(v, str) for item in hashes.items() for v in item
        )
        _check("source_sha256", hashes, ok, "texts by file name")
        _check(
            "tiled_from",
            self.tiled_from,
            self.tiled_from is None or _is_int(self.tiled_from, 1, 2**16),
            "in 1..65536",
        )
        _check("extra", self.extra, isinstance(self.extra, Mapping), "an object")

    def to_json(self, domains: tuple[str, ...]) -> str:
        """The JSON text stored in the file; the same facts always give the same text."""
        facts = {"schema_version": SCHEMA_VERSION, **asdict(self), "domains": list(domains)}
        return json.dumps(facts, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str) -> tuple["TraceMetadata", tuple[str, ...]]:
        """Metadata and domain names of the JSON text; unknown keys are ignored."""
        facts = parse_json(text, f"{name}: metadata")
        if not isinstance(facts, dict):
            raise ValueError(f"{name}: metadata must be a JSON object, got {type(facts).__name__}")
        if facts.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{name}: metadata.schema_version must be {SCHEMA_VERSION}, "
                f"got {facts.get('schema_version')!r:.80}"
            )
        domains = facts.get("domains")
        if not isinstance(domains, list) or not all(isinstance(d, str) for d in domains):
            raise ValueError(
                f"{name}: metadata.domains must be a list of texts, got {domains!r:.80}"
            )
        for key in ("model", "n_experts", "top_k"):
            if key not in facts:
                raise ValueError(f"{name}: metadata.{key} is missing")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known
        }
        try:
            return cls(**values), tuple(domains)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _check(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"metadata.{name} must be {rule}, got {value!r:.80}")


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
