"""`trl-promptkd doctor`: what goes wrong silently in distillation, looked for in the user's own models and rows.

`case.py` (what is looked at), `data_checks.py`, `model_checks.py`, `memory.py`, `diagnosis.py` (all of it in order).
"""

from .case import Finding
from .diagnosis import diagnose, passed


__all__ = ["Finding", "diagnose", "passed"]
