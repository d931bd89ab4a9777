"""Measures speed and memory beside rivals and beside what the machine can do, a file for each part."""
