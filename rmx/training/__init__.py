"""Scores of rollouts, the tokens that decide, the loss and the training loop."""
