"""Ways to spread a run over ranks, one file each."""
