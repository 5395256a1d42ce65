"""The yardstick: a plain interpreter with the same modules that does the same steps and forks itself, nothing else.

Run as a script; reads a line, does a step, forks, prints the milliseconds that fork(2) took. Children stay, frozen, as
a box's copies do, up to the number given.
"""

import os
import signal
import sys
import time
from collections import deque

keep, modules, step = int(sys.argv[1]), sys.argv[2], sys.argv[3]
space: dict[str, object] = {}
exec(modules, space)  # noqa: S102  (the measuring script's own text)
kept: deque[int] = deque()
print("ready", flush=True)
for _line in sys.stdin:
    if len(kept) == keep:
        os.kill(kept[0], signal.SIGKILL)
        os.waitpid(kept.popleft(), 0)
    exec(step, space)  # noqa: S102
    time.sleep(0.02)
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    print((time.perf_counter() - started) * 1e3, flush=True)
    kept.append(child)
for child in kept:
    os.kill(child, signal.SIGKILL)
