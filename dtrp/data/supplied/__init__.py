"""Data sets that a function of the user's makes, read by loader workers."""
