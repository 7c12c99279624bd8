"""`trl-promptkd doctor`: finds silent faults of distillation in the user's own models and rows.

`case.py` has what the checks look at. `data_checks.py`, `model_checks.py` and `memory.py` are the checks, and
`diagnosis.py` runs them in order.
"""

from .case import Finding
from .diagnosis import diagnose, passed


__all__ = ["Finding", "diagnose", "passed"]
