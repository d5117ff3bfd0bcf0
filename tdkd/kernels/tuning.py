"""Launch configurations of the Triton kernels.

``benchmarks/tune.py`` times ``CHOICES`` on a device and writes the winners to ``tuned.json``, one
entry an architecture. Nothing is ever tuned inside a training step.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).parent / "tuned.json"


class Config(NamedTuple):
    """How a kernel is launched."""

    block: int
    """logits that one program holds at once."""
    num_warps: int
    num_stages: int = 1
    """depth of the software pipeline of its loads."""


# The first is taken where an architecture has not been measured.
_STREAM = (
    Config(8192, 8),
    Config(4096, 4),
    Config(4096, 8),
    Config(8192, 4),
    Config(8192, 16),
    Config(16384, 16),
    Config(8192, 8, 2),
)
CHOICES: dict[str, tuple[Config, ...]] = {
    "select_stream": _STREAM,
    "student_stream": _STREAM,
    "student_grad": (Config(4096, 4), *(c for c in _STREAM if c != Config(4096, 4))),
}

_overridden: dict[str, Config] = {}


def config(kernel: str, device: torch.device, heavy: bool = False) -> Config:
    """The configuration of ``kernel`` on ``device``.

    ``heavy`` rows, which have a softcap, weights or no alignment to 16 logits, take more registers
    a logit: half a block of them is held at once.
    """
    found = _overridden.get(kernel)
    if found is None:
        found = _tuned().get(architecture(device), {}).get(kernel, CHOICES[kernel][0])
    return found._replace(block=max(128, found.block // 2)) if heavy else found


@contextlib.contextmanager
def override(kernel: str, choice: Config) -> Iterator[None]:
    """Within the context, ``kernel`` is launched with ``choice`` (for tuning and for tests)."""
    before = _overridden.get(kernel)
    _overridden[kernel] = choice
    try:
        yield
    finally:
        if before is None:
            del _overridden[kernel]
        else:
            _overridden[kernel] = before


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90 and its like on NVIDIA, gfx942 and its like on AMD, and cpu (the interpreter)."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", None)
    if torch.version.hip and name:
        return str(name).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _tuned() -> dict[str, dict[str, Config]]:
    if not TABLE.exists():
        return {}
    table = json.loads(TABLE.read_text())
    return {
        arch: {kernel: Config(**fields) for kernel, fields in kernels.items()}
        for arch, kernels in table.items()
    }
