"""How a network is trained and pruned."""
