"""How much hypothesis tries, the same at each run."""

from hypothesis import HealthCheck, settings


SECONDS = 5.0  # about a second on a machine that does nothing else


def fuzz(max_examples):
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
