"""The folder of a run for training loops of the user's: `dtrp.RunFolder`."""
