"""What a run leaves behind: its folder, checkpoints, metrics, plots and, when asked, its W&B record."""
