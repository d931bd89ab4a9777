"""Chooses the factors of every map within a parameter budget."""
