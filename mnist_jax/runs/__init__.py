"""What a run leaves on disk: its folder, checkpoints, results and environment."""
