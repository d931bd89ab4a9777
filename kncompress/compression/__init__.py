"""Fits factors to a whole model: moments of its inputs, fits by map and by layer, repair, what is saved and lost."""
