"""The Qwen network, its parameters and its files."""
