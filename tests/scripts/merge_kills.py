"""Run by test_merge.py: merges parts of a cache, and is killed by SIGKILL at random moments, again and again.

The only argument is JSON: `parts`, `output_dir`, `seed`. Prints a report as JSON. Everything is imported once; the
merges are forks of this process.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from trl_promptkd.teacher_cache import merge


settings = json.loads(sys.argv[1])
target, chance = Path(settings["output_dir"]), random.Random(settings["seed"])
link = merge._link


def slowly(path: str, temporary: str) -> None:
    """Half of the file for a while, and then all of it."""
    data = Path(path).read_bytes()
    Path(temporary).write_bytes(data[: len(data) // 2])
    time.sleep(0.1)
    os.remove(temporary)
    link(path, temporary)


merge._link = slowly
report = {"kills": 0, "half_written": 0}
while True:
    before = set(target.glob("*"))
    child = os.fork()
    if child == 0:
        try:
            merge.merge_teacher_caches(settings["parts"], str(target))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    ended = 0
    while not ended and set(target.glob("*")) == before:  # until it has begun to place files
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    time.sleep(0 if ended else chance.uniform(0, 0.25))
    if not ended:
        is_done = (target / "manifest.json").exists()
        ended, status = os.waitpid(child, 0 if is_done else os.WNOHANG)
    if ended:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    report["kills"] += 1
    report["half_written"] += any(path.suffix == ".incomplete" for path in target.iterdir())
print(json.dumps({**report, "status": os.waitstatus_to_exitcode(status)}))
