"""``python -m train.findings``: which policy wins where, and why, as ``docs/findings.md``.

Every number on the page comes from `ndp_gym.evaluate` and `ndp_gym.explain` on recorded routing.
"""
