"""The start of ranks: what this process is, who is missing, and the agent that starts them."""
