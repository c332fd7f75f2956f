"""Datasets, chat templates, rewards and grading."""

from minigrpo.data.chat import Tokenizer, load_tokenizer
from minigrpo.data.datasets import Dataset, PromptSet, load_dataset, tokenize
from minigrpo.data.rewards import score_completions

__all__ = ["Dataset", "PromptSet", "Tokenizer", "load_dataset", "load_tokenizer", "score_completions", "tokenize"]
