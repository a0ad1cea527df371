"""GGUF, the single file that llama.cpp and what is built on it read: weights, configuration and tokenizer."""
