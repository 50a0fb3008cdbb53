"""``python -m train.models``: agents of one model, of many, and of all but the one they run on."""
