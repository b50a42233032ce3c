"""Files: data, images, checkpoints, and the folder of a run."""
