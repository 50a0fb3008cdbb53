"""``python -m ndp_gym``: the same program as ``ndp-gym``."""

import sys

from ndp_gym.cli import main

sys.exit(main())
