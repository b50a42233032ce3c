"""Sample quality: Inception features, and distances between sets of features."""
