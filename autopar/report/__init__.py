"""Plans for people: text tables."""
