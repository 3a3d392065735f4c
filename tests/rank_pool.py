"""Processes that are the ranks of a gloo group: started once, each check is a function that all of them run.

`run(2, "rank_checks", "name", *args)` returns what the function returned on each rank; where it raised on some, an
AssertionError holds their tracebacks. A check that outlasts its time ends the processes.
"""

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

HERE, SECONDS = str(Path(__file__).parent), 60
_POOLS = {}


class Pool:
    def __init__(self, size, timeout=30):
        os.environ["PYTHONPATH"] = os.pathsep.join([HERE, str(Path(HERE).parent), os.environ.get("PYTHONPATH", "")])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_checks", "tiny_models", "transformers.modeling_utils"])
        path = tempfile.mktemp()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            p = context.Process(target=_work, args=(theirs, rank, size, path, timeout), daemon=True)
            p.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(p)

    def send(self, module, name, *args):
        for pipe in self.pipes:
            pipe.send((module, name, args))

    def receive(self, seconds=SECONDS):
        """(result, traceback) of every rank; of one that died, (None, text)."""
        end, out = time.monotonic() + seconds, []
        for rank, pipe in enumerate(self.pipes):
            try:
                answered = pipe.poll(max(end - time.monotonic(), 0))
                out.append(pipe.recv() if answered else (None, f"rank {rank} did not answer in {seconds} s"))
            except (EOFError, ConnectionError):
                out.append((None, f"rank {rank} died, exit code {self.processes[rank].exitcode}"))
        return out

    def stop(self):
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.join()


def run(size, module, name, *args, seconds=SECONDS):
    pool = _POOLS.setdefault(size, None) or Pool(size)
    _POOLS[size] = pool
    pool.send(module, name, *args)
    answers = pool.receive(seconds)
    failed = [f"rank {r}:\n{text}" for r, (_, text) in enumerate(answers) if text]
    if failed:  # others may be waiting in a collective
        _POOLS.pop(size).stop()
    assert not failed, "\n".join(failed)
    return [result for result, _ in answers]


def stop():
    while _POOLS:
        _POOLS.popitem()[1].stop()


def _work(pipe, rank, size, path, timeout):
    import faulthandler

    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", f"file://{path}", timedelta(seconds=timeout), size, rank)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (getattr(importlib.import_module(module), name)(*args), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send(answer)
