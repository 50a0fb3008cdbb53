"""``python -m train.synthetic.calibrate``: fit the profiles that model presets are drawn from.

Writes ``ndp_gym/synthesize/calibrated.toml`` from the recordings; every profile is fitted to a
whole recording.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ndp_gym import synthesize
from ndp_gym.report import write_whole
from ndp_gym.synthesize import RoutingProfile, fit_profile
from ndp_gym.trace import RoutingTrace
from train.findings.recordings import default_folder, missing, recordings

KNOTS = 13  # of amplitudes by layer; fewer layers have a knot each
OUT = Path(synthesize.__file__).with_name("calibrated.toml")
HEAD = """\
# Routing profiles fitted to public recordings by python -m train.synthetic.calibrate;
# amplitudes by layer are knots, interpolated. See ndp_gym/synthesize/profile.py for the fields.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a profile to every recording and write them."""
    parser = argparse.ArgumentParser(prog="python -m train.synthetic.calibrate")
    parser.add_argument("--recordings", type=Path, default=default_folder())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    absent = missing(args.recordings)
    if absent:
        print(f"{absent[0]} is not below {args.recordings}", file=sys.stderr)
        return 2
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as folder:
        for recording in recordings(args.recordings, Path(folder)):
            trace = RoutingTrace.open(recording.path)
            parts.append(entry(trace, fit_profile(trace)))
            print(recording.title, file=sys.stderr)
    write_whole(args.out, "\n".join(parts))
    return 0


def entry(trace: RoutingTrace, profile: RoutingProfile) -> str:
    """One table of the file."""
    facts = trace.metadata
    lines = [f'["{facts.preset}"]', f"n_experts = {trace.n_experts}", f"top_k = {trace.top_k}"]
    for name, value in profile.to_json().items():
        if name in ("popularity", "fast"):
            n_knots = min(KNOTS, len(value))
            value = profile.by_layer(name, len(value))
            places = np.linspace(0, len(value) - 1, n_knots)
            value = np.interp(places, np.arange(len(value)), value).tolist()
        if isinstance(value, list):
            lines.append(f"{name} = [{', '.join(f'{v:.3f}' for v in value)}]")
        elif value is not None:
            lines.append(
                f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}"
            )
    source = f"{facts.source}, {trace.n_rows:,} tokens".replace('"', "'")
    return "\n".join([*lines, f'source = "{source}"', ""])


if __name__ == "__main__":
    sys.exit(main())
