"""How ranks talk: messages, links, collectives, failures."""
