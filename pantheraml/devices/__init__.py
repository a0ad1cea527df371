"""What hardware is there and how full it is."""
