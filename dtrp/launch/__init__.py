"""Starting processes, joining them, and stopping them."""
