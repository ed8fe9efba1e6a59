"""Each job in a process of its own, with a limit on time and memory, so that one that hangs or dies ends nothing."""

from __future__ import annotations

import multiprocessing as mp
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

MEMORY = 8 * 2**30  # bytes of data a process may hold


class Job(NamedTuple):
    """One that runs."""

    key: Any
    process: BaseProcess
    pipe: Connection
    start: float


def run_all(
    work: Callable[[Any], Any], keys: Sequence[Any], *, processes: int, seconds: float, preload: Sequence[str] = ()
) -> Iterator[tuple[Any, Any]]:
    """`(key, work(key))` as they end, or `(key, why)`, a text, where there is no result.

    `work` is a function of a module, as processes import it. `preload` are modules that all of them need.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting = iter(keys)
    running: list[Job] = []
    while True:
        while len(running) < processes and (key := next(waiting, None)) is not None:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, key, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append(Job(key, process, ours, time.monotonic()))
        if not running:
            return
        left = min(job.start for job in running) + seconds - time.monotonic()
        ready = wait([job.pipe for job in running], timeout=max(left, 0))
        for job in list(running):
            if job.pipe in ready:
                yield job.key, _receive(job)
            elif time.monotonic() - job.start >= seconds:
                job.process.kill()
                yield job.key, f"took more than {seconds:.0f} s"
            else:
                continue
            job.process.join()
            job.pipe.close()
            running.remove(job)


def _receive(job: Job) -> Any:
    try:
        return job.pipe.recv()
    except EOFError:
        job.process.join()
        return f"its process ended with exit code {job.process.exitcode}"


def _child(work: Callable[[Any], Any], key: Any, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    pipe.send(work(key))
    pipe.close()
