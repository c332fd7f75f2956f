"""Datasets, chat templates, rewards and grading."""
