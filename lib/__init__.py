"""What the four packages share: the training engine, run folders, checkpoints, images, plots and reports."""
