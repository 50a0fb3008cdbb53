"""``python -m traces.minimoe``: text -> weights -> trace -> card, deterministically.

About 25 minutes on one core; ``--skip-training`` records again from the shipped weights and
``--card-only`` only rewrites the card. The same machine and packages give the same files.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ndp_gym.trace import RoutingTrace
from traces.minimoe import bundle, card, text, tokenizer, weights
from traces.minimoe.model import Config
from traces.minimoe.prompts import Stream
from traces.minimoe.record import record
from traces.minimoe.train import Recipe, held_out_loss, train
from traces.record.generate import Sampling

FOLDER = Path(__file__).resolve().parent.parent
_VOCABULARY_CHARS = 600_000  # of each domain


def _report(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _train(domains: Sequence[text.Domain], recipe: Recipe, path: Path) -> None:
    _report("learning the vocabulary")
    sample = ("\n".join(d.train)[:_VOCABULARY_CHARS] for d in domains)
    coder = tokenizer.Tokenizer(tokenizer.learn_merges(sample))
    streams = {d.name: coder.stream(d.train) for d in domains}
    for name, stream in streams.items():
        _report(f"{name}: {len(stream):,} tokens to train on")
    model = train(streams, Config(), recipe, _report)
    trained = weights.Weights(
        model=model, tokenizer=coder, n_steps=recipe.n_steps, made_with=weights.versions()
    )
    weights.save(path, trained)
    _report(f"wrote {path.name}")


def _record(
    held_out: Mapping[str, Stream], source: weights.Weights, n_requests: int, folder: Path
) -> RoutingTrace:
    sampling = Sampling()
    requests = record(source.model, held_out, n_requests, sampling, _report)
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        trace = bundle.make_trace(
            requests, source, sampling, folder / card.WEIGHTS_FILE, Path(parts)
        )
        saved = trace.save(folder / card.TRACE_FILE)
    _report(f"wrote {card.TRACE_FILE}")
    return saved


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the files in the folder asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m traces.minimoe", description=__doc__)
    parser.add_argument("--skip-training", action="store_true", help="use the weights at hand")
    parser.add_argument("--card-only", action="store_true", help="use weights and trace at hand")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files lie")
    parser.add_argument("--requests", type=int, default=140, help="requests to record")
    parser.add_argument("--steps", type=int, default=Recipe().n_steps, help="training steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    _report("reading text of the installation")
    domains = text.load_domains()
    weights_path = options.folder / card.WEIGHTS_FILE
    if not (options.skip_training or options.card_only):
        _train(domains, Recipe(n_steps=options.steps), weights_path)
    source = weights.load(weights_path)
    held_out = {d.name: source.tokenizer.stream(d.held_out) for d in domains}
    if options.card_only:
        trace = RoutingTrace.open(options.folder / card.TRACE_FILE)
    else:
        trace = _record(held_out, source, options.requests, options.folder)
    losses = {name: held_out_loss(source.model, stream) for name, stream in held_out.items()}
    card.write(options.folder, trace, source, losses)
    _report(f"wrote {card.CARD_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
