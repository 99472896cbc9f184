"""What experiments share: the terminal, the run folder, the training loop, the pictures."""
