"""Where transformers meets the Kronecker layers; import the modules of this package by name.

This file stays empty: ``plugin`` is imported while transformers itself is still being imported.
"""
