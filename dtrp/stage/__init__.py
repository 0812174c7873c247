"""One stage's forward, backward and update, and what it keeps in between."""
