"""What a run's model says: its weights in one process, tests, predictions, and files for plain PyTorch."""
