"""Synthetic recordings held against the recordings they imitate: `python -m train.synthetic`.

Writes ``docs/synthetic.md``.
"""
