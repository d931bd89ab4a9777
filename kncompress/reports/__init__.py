"""What people look at when a run has ended: the HTML page, figures, W&B content, the summary."""
