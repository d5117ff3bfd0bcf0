"""Two processes of one run, as ``torchrun`` would start them."""

import faulthandler
import os
import socket
import sys

import torch
import torch.multiprocessing as mp

DEADLINE = 300
"""seconds after which a process that has not ended says where it stands, and ends."""


def join(rank, world, port):
    """What a worker does first: its place among the others, and one thread."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)


def _bounded(rank, worker, *args):
    """A worker that waits for the other for so long and no longer, and leaves without destructors.

    Gloo's can wait for ever: the thread that frees a group (the last reference is a DDP model's)
    joins gloo's threads and keeps the interpreter's lock, for which these wait to free a tensor
    (pytorch issue 56297).
    So ``worker`` returns what holds the group, which lives until the process ends.
    """
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    _kept = worker(rank, *args)
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start(worker, *args):
    """``worker(rank, 2, port, *args)``, which returns its trainer, in two processes, until both
    have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = mp.spawn(_bounded, (worker, 2, port, *args), nprocs=2, join=False)
    try:
        while not running.join():
            pass
    finally:
        for process in running.processes:
            process.kill()
