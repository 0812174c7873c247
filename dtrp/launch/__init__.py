"""Processes: how they start, join each other, and end."""
