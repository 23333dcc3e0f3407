"""What a network is worth: accuracy, score, bytes."""
