"""Scripts for `evaluate.load`, which copies and imports them by their paths; see [`trl_promptkd.metrics.load`]."""
