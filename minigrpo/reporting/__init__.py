"""Reports made of a run's files: history, statistics, a verdict in words, pictures and the page."""
