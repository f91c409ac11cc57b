"""What a run leaves: the results, what the console and W&B show of them, and the files."""
