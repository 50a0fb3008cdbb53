"""``python -m train.results``: agents beside tuned heuristics on test, and the page about it."""
