"""The loop behind ``dtrp train``: settings, the run on disk, its saves and its results."""
