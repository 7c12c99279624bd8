"""The offline teacher: run it once, then train from its stored distributions.

- `codec.py`: what is kept of a distribution.
- `manifest.py`: what a cache says about itself.
- `shards.py`: rows on disk.
- `reader.py`: rows and distributions of a finished cache.
- `builder.py`, `writer.py`: building a cache, with hidden states from `sources.py`.
- `merge.py`, `verify.py`: joining the parts of a cache, and comparing it with the live teacher.
"""

from .builder import build_teacher_cache
from .merge import merge_teacher_caches
from .reader import TeacherCache
from .verify import verify_teacher_cache


__all__ = ["TeacherCache", "build_teacher_cache", "merge_teacher_caches", "verify_teacher_cache"]
