"""Images that do not fit in memory: a folder's files, listed in a few bytes each, and decoded when they are needed."""
