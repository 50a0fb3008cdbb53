"""The card ``minimoe.md``: how the recording was made, its licence, its statistics."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_requests import SPLITS
from traces.minimoe.card_table import table
from traces.minimoe.model import MiniMoE
from traces.minimoe.real_models import SOURCE
from traces.minimoe.train import Recipe
from traces.minimoe.weights import Weights

TRACE_FILE = "minimoe.safetensors"
WEIGHTS_FILE = "minimoe_weights.safetensors"
CARD_FILE = "minimoe.md"

_HEAD = """\
# minimoe: the bundled routing recording

*Written by `python -m traces.minimoe`; do not edit.*

A language model with {layers} routed layers of {experts} experts, top-{top_k}, {millions:.1f} M
parameters, trained by this project on text that a Python installation carries, then run on held-out
prompts with its routers hooked: real prefill, real sampled decode, real gate weights. The preset
`minimoe-16b` gives this routing the costs of a 16B-class model with the same layers, experts and
top-k.

**Not evidence for locality.** {locality}

The leak, the balance loss and the mixed prompts were chosen by looking at statistics like those
below, and there is one seed. The model is tiny: what its answers say means nothing.

| file | content | sha256 |
|---|---|---|
| `{trace_file}` | {n_rows:,} tokens, {n_requests} requests, {trace_mb:.1f} MB | `{trace_sha}` |
| `{weights_file}` | float16 weights, vocabulary, {weights_mb:.1f} MB | `{weights_sha}` |

Licence of both files: **{licence}**, as the project. They do not store the text, except the tokens
of request 0 (in the trace's metadata), from which anyone can recompute its routing; with the
weights the tokens of the others can be worked out from the routing of the first layer.
"""

_MAKING = """\
## How it was made

- **Text**, ASCII, shuffled with a fixed seed; a twelfth of the documents (an eighth in `ref` and
  `legal`) is held out for prompts. `code`: standard library without docstrings and comments. `api`:
  docstrings of the standard library, numpy and torch. `ref`: the language reference
  (`pydoc_data.topics`). `legal`: licence files of the installed packages, repeated paragraphs
  removed. `data`: Unicode code points and names in shuffled lists (held-out lists are new orders of
  names seen in training). Licences of the sources: PSF-2.0 (Python), BSD-3-Clause (numpy, torch),
  Unicode-3.0 (names); licence texts may be copied verbatim.
- **Vocabulary**: byte pairs, {vocabulary} tokens; token 0 separates documents.
- **Router**: `logits_t = sqrt(1 - a^2) * sum over j = 0..3 of a^j W x_(t-j)`, top-{top_k}, softmax
  over the chosen; a by layer: {leaks}.
  This *leaky router* makes consecutive tokens share experts.
- **Training**: {steps} steps of up to 2048 tokens, AdamW, balance loss {balance} on a running load,
  no dropping, no shared expert; half of the sequences switch domain in the middle. One thread.
- **Recording**: domains in turn; prompts of {min_prompt} to {max_prompt} tokens, every second round
  *mixed* (30-70 % from another domain first, as a system prompt would be); {decode} tokens sampled
  at temperature {temperature}, top-p {top_p}, each fed back through the cache. {n_looped} answers
  fell into a loop and were drawn again. Shipped half-precision weights, float32 arithmetic. Ids in
  order of gate weight; gates sum to 1, float16.
- **Splits** by conversation (every request is one), even over domains: {splits}.
- **Made with** {made_with}; recorded with {recorded_with}; one thread. Other versions hold
  other text and round otherwise: `--skip-training` records anew from the shipped weights.

Held-out loss in nats per token: {losses}.
"""

_STATISTICS = """\
## Statistics of the decode rows, beside real models

Means over layers; definitions in `ndp_gym/trace_stats.py`.

{table}

{source}"""


def _n_parameters(model: MiniMoE) -> int:
    return sum(p.numel() for p in model.parameters())


def text(folder: Path, trace: RoutingTrace, source: Weights, losses: Mapping[str, float]) -> str:
    """The card of ``trace`` and ``source``, whose files lie in ``folder``."""
    config, requests, extra = source.model.config, trace.requests, trace.metadata.extra
    weights_bytes = (folder / WEIGHTS_FILE).read_bytes()
    splits = Counter(SPLITS[i] for i in requests.split)
    head = _HEAD.format(
        layers=trace.n_layers,
        experts=trace.n_experts,
        top_k=trace.top_k,
        millions=_n_parameters(source.model) / 1e6,
        locality=extra["locality"],
        trace_file=TRACE_FILE,
        n_rows=trace.n_rows,
        n_requests=len(requests),
        trace_mb=(folder / TRACE_FILE).stat().st_size / 1e6,
        trace_sha=trace.sha256,
        weights_file=WEIGHTS_FILE,
        weights_mb=len(weights_bytes) / 1e6,
        weights_sha=hashlib.sha256(weights_bytes).hexdigest(),
        licence=trace.metadata.licence,
    )
    making = _MAKING.format(
        vocabulary=config.vocabulary_size,
        top_k=trace.top_k,
        n_looped=extra["n_looped"],
        leaks=" ".join(f"{a:.2f}" for a in extra["router_leak"]),
        steps=source.n_steps,
        balance=Recipe().balance,
        min_prompt=int(requests.n_prompt.min()),
        max_prompt=int(requests.n_prompt.max()),
        decode=extra["sampling"]["n_tokens"],
        temperature=extra["sampling"]["temperature"],
        top_p=extra["sampling"]["top_p"],
        splits=", ".join(f"{splits[s]} {s}" for s in SPLITS),
        made_with=source.made_with,
        recorded_with=extra["recorded_with"],
        losses=", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()),
    )
    statistics = _STATISTICS.format(table=table(trace), source=SOURCE)
    return "\n".join((head, making, statistics))


def write(folder: Path, trace: RoutingTrace, source: Weights, losses: Mapping[str, float]) -> None:
    """Write the card into ``folder``."""
    card = text(folder, trace, source, losses)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
