"""The offline teacher: run it once, train from what it said for ever.

`codec.py` (what is kept of a distribution), `manifest.py` (what a cache says about itself), `shards.py` (rows on the
disk), `reader.py`, `writer.py`, `sources.py` (where hidden states come from), `builder.py`, `merge.py`, `verify.py`.
"""

from .builder import build_teacher_cache
from .merge import merge_teacher_caches
from .reader import TeacherCache
from .verify import verify_teacher_cache


__all__ = ["TeacherCache", "build_teacher_cache", "merge_teacher_caches", "verify_teacher_cache"]
