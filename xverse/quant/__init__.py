"""MODEL -> SMALLER. Quantized linear layers, put into a model from outside."""
