"""tdkd info: what this installation can do."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tdkd
from tdkd import ops
from tdkd.errors import EXTRAS
from tdkd.kernels import backends


def run() -> None:
    """Prints versions, devices, the implementations of the ops, and which extras are missing."""
    table = Table(show_header=False, title="tdkd")
    table.add_row("tdkd", tdkd.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    for package, source in EXTRAS.items():
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, escape(f'missing: pip install "{source}"'))
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join(["cpu", *devices]) if cuda else "cpu")
    table.add_row(
        "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    table.add_row("reference", "every op, device and dtype; takes what no kernel does")
    wide = "" if backends.MULTIPLIES_BFLOAT16 else "; bfloat16 heads multiply in float32"
    table.add_row("cpu kernels", escape(backends.MISSING or backends.capability() + wide))
    largest = f"Triton, sets of at most {backends.GPU_MAX_K:,}; the reference takes larger ones"
    table.add_row("gpu kernels", backends.GPU_MISSING or largest)
    for device in ("cpu", "cuda"):
        table.add_row(f"linear_td_loss, {device}", ops.routes(device))
    Console().print(table)
