"""Whether predicted loss and recorded routing hold once the bundled model is quantized."""
