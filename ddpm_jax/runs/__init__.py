"""What the commands do: train, sample, edit, evaluate, show, import and export."""
