"""The bundled recording: a small mixture-of-experts language model, trained and hooked here.

``python -m traces.minimoe`` makes everything again: text, vocabulary, weights, trace and card.
"""
