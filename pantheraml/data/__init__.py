"""From rows in any known format to token ids and labels."""
