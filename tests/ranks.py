"""Two processes of one run, as ``torchrun`` would start them."""

import os
import socket

import torch
import torch.multiprocessing as mp


def join(rank, world, port):
    """What a worker does first: its place among the others, and one thread."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)


def start(worker, *args):
    """``worker(rank, 2, port, *args)`` in two processes, until both have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (2, port, *args), nprocs=2)
