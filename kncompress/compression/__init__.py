"""Fits factors to a whole model: moments of its inputs, fits map by map and layer by layer, repair, reports."""
