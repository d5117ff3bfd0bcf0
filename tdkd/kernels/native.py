"""The compiled CPU kernels: whether they are here, and which tensors they take.

Schemas and fakes live beside each op and need torch alone; ``tdkd._C`` is the C++ extension that
``setup.py`` builds from ``csrc/``, and registers implementations of those schemas when loaded.
"""

from __future__ import annotations

import importlib
import warnings

import torch
from torch import Tensor

LIBRARY = torch.library.Library("tdkd", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Loads the extension; what is wrong where that is not possible."""
    try:
        importlib.import_module("tdkd._C")
    except ModuleNotFoundError:
        return "the CPU kernels are not built (no C++20 compiler, or an isolated build)"
    except ImportError as error:
        warnings.warn(f"tdkd: the CPU kernels do not load: {error}", stacklevel=2)
        return f"the CPU kernels do not load: {error}"
    return None


MISSING = _load()
"""Why there are no CPU kernels; None where there are."""


def why_not(*tensors: Tensor) -> str | None:
    """Why no kernel takes these tensors; None where one does."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"there is no kernel for {x.device.type} yet"
        if x.is_floating_point() and x.dtype not in DTYPES:
            return f"there is no kernel for {str(x.dtype).removeprefix('torch.')}"
    return MISSING


def capability() -> str:
    """The instruction set of the CPU kernels: portable, avx2 or avx512."""
    return torch.ops.tdkd.cpu_capability()


def fake(op: str, function: object) -> None:
    """Registers what an op returns for tensors without data."""
    torch.library.register_fake(f"tdkd::{op}", function, lib=LIBRARY)  # type: ignore[arg-type]
