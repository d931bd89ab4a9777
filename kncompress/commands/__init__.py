"""The verbs, and the way from a command line to them; the only floor that knows Hydra."""
