"""Where the linear maps of a model lie, which of them get which factors, and how they are swapped."""
