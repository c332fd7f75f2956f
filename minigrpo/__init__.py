"""GRPO for Qwen models in pure JAX."""
