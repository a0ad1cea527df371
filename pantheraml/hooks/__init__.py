"""Scripts that are not ours: an unchanged TRL script on every GPU, and the guides' managers."""
