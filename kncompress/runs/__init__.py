"""Run folders: taking one, what is written into it, and reading it back."""
