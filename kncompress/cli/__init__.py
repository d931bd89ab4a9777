"""The way from a command line to a verb: Hydra, overrides, sweeps, search, resume, completion, help."""
