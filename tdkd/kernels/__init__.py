"""One folder an op. ``reference.py`` defines it in plain PyTorch; kernels stand beside it."""
