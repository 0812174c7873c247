"""How ranks talk: messages, links, collectives over the ranks, and what happens when one fails."""
