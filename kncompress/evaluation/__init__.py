"""Benchmarks: this package against its rivals and against what the machine can do, a file for each part."""
