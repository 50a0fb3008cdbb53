"""``docs/env.md``, made from the docstring: ``python -m ndp_gym.env_docs > docs/env.md``."""

from __future__ import annotations

import inspect

__all__ = ["page"]


def page() -> str:
    """The data sheet as a Markdown page."""
    from ndp_gym import ENV_ID
    from ndp_gym.env import NDPPlacementEnv

    sheet = inspect.cleandoc(NDPPlacementEnv.__doc__ or "")
    note = "<!-- python -m ndp_gym.env_docs > docs/env.md -->"
    return f"# {ENV_ID}\n\n{note}\n\n{sheet}\n"


if __name__ == "__main__":
    print(page(), end="")
