"""Scripts for `evaluate.load`, which copies and imports them by their paths. See [`trl_promptkd.metrics.load`]."""
