"""Training: teacher and student, the LightningModules, the optimiser, checkpoints, loggers, signals."""
