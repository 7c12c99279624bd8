"""The offline teacher: run it once, train from what it said for ever.

`codec.py` (what is kept of a distribution), `manifest.py` (what a cache says about itself), `reader.py`, `builder.py`.
"""

from .builder import build_teacher_cache
from .reader import TeacherCache


__all__ = ["TeacherCache", "build_teacher_cache"]
