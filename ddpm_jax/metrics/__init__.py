"""How good samples are: Inception features and the distances between sets of them."""
