"""What a run's files say: history, statistics, a verdict in words, pictures and the page."""
