"""``python -m train.synthetic``: hold synthetic recordings against real ones, write the page."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ndp_gym.report import write_whole
from ndp_gym.trace import RoutingTrace
from train.findings.recordings import default_folder, missing, recordings
from train.synthetic.compare import compare
from train.synthetic.page import page

OUT = Path("docs/synthetic.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every recording that is there and write the page."""
    parser = argparse.ArgumentParser(prog="python -m train.synthetic", description=main.__doc__)
    parser.add_argument("--recordings", type=Path, default=default_folder())
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    args = parser.parse_args(argv)
    started = time.process_time()
    compared = []
    with tempfile.TemporaryDirectory() as folder:
        for recording in recordings(args.recordings, Path(folder)):
            compared.append(compare(recording.title, RoutingTrace.open(recording.path)))
            found = compared[-1]
            print(
                f"{found.title}: synthetic {found.passed('synthetic')}, control "
                f"{found.passed('control')} of {len(found.lines)} within tolerance",
                file=sys.stderr,
            )
    minutes = (time.process_time() - started) / 60
    write_whole(args.out, page(compared, missing(args.recordings), minutes))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
