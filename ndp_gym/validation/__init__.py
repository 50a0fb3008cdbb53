"""Published measurements against what the project computes: calibrated, predicted and bounds.

Each module of a group turns the project's own presets and cost functions into rows; nothing here
simulates anew. ``results`` judges the rows, ``holdout`` and ``orderings`` say how far to trust
them, ``page`` writes ``docs/validation.md``.
"""
