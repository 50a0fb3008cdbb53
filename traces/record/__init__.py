"""Record which experts a mixture-of-experts model chooses, while it answers prompts.

``python -m traces.record`` records Hugging Face models; ``traces.minimoe`` makes the bundled
recording with the same hooks, request loop and writer.
"""
