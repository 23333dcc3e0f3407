"""The network as the paper tells it, in plain PyTorch, and its checkpoints."""
