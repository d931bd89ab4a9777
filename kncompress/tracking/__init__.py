"""What a run leaves behind: its record, metrics, checkpoints, and what a person sees while it goes."""
