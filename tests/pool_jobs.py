"""Jobs for the tests of `eval.coverage.pool`, whose processes import this module."""

from __future__ import annotations

import os
import time


def work(key: int) -> str | int:
    """Key 1 hangs, 2 dies, 3 takes more memory than it may; all others give their square."""
    if key == 1:
        time.sleep(60)
    if key == 2:
        os.abort()
    if key == 3:
        try:
            return len(bytearray(2**40))
        except MemoryError:
            return "out of memory"
    return key**2
