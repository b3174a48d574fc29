"""THE ARITHMETIC. Every operation of the models, in plain PyTorch first."""
