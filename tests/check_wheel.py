"""Builds the wheel and uses it away from the checkout: `python -m tests.check_wheel`.

The installed copy runs without the `site` module, so the editable install in the same environment
cannot lend it the checkout's `policies/`, `train/` or `traces/`.
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = "ndp_gym/data/minimoe.safetensors"
PROGRAM = """
import importlib.util, pathlib, sys
import gymnasium, ndp_gym
from gymnasium.utils.env_checker import check_env

site = pathlib.Path(sys.argv[1])
assert pathlib.Path(ndp_gym.__file__).is_relative_to(site), ndp_gym.__file__
found = [name for name in ("policies", "train", "traces") if importlib.util.find_spec(name)]
assert not found, f"the environment outside the checkout offers {found}"
env = gymnasium.make("NDPPlacement-v0")
check_env(env.unwrapped, skip_render_check=True)
env.reset(seed=0)
_, reward, _, _, _ = env.step(env.action_space.sample())
print(f"gym.make from the wheel: one step, reward {reward:+.3f}")
"""


def build_wheel(folder: Path) -> Path:
    """The wheel of the checkout, built into `folder` without the network."""
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"the wheel cannot be built:\n{result.stdout}{result.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Exits with a message unless the wheel holds the library, its recording, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    strangers = [name for name in names if not name.startswith(("ndp_gym/", "ndp_gym-"))]
    if strangers:
        sys.exit(f"the wheel must hold only ndp_gym, but also has {strangers}")
    missing = {BUNDLED, "ndp_gym/py.typed"} - set(names)
    if missing:
        sys.exit(f"the wheel lacks {sorted(missing)}")


def main() -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        wheel = build_wheel(folder)
        check_contents(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, the library alone")
        site = folder / "site"
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([sys.executable, *install, str(wheel)], check=True)
        paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
        environment = {**os.environ, "PYTHONPATH": paths}
        outside = [sys.executable, "-S", "-c", PROGRAM, str(site)]
        sys.exit(subprocess.run(outside, cwd=folder, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
