"""Builds the C++ kernels where a compiler and torch are at hand; metadata is in pyproject.toml.

Without either the package installs all the same and runs on the reference; `tdkd info` says so.
With `pip install .` an isolated build sees no torch: install with `--no-build-isolation`.
`TDKD_SANITIZE=address,undefined` builds with those sanitizers (see the Makefile).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g0"]
# The oldest torch whose stable ABI the library asks for, and the oldest Python of its limited API.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def why_not() -> str | None:
    """What is missing for a build of the kernels."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return "torch cannot be imported (an isolated build? use --no-build-isolation)"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("#include <bit>\nint main() { return std::popcount(0u); }\n")
        command = [get_cxx_compiler(), "-std=c++20", "-fsyntax-only", str(source)]
        try:
            probe = subprocess.run(command, capture_output=True)
        except OSError:
            return f"{command[0]} is not there"
    return None if probe.returncode == 0 else f"{command[0]} compiles no C++20"


def extension() -> dict:
    missing = why_not()
    if missing:
        print(f"tdkd: building without CPU kernels: {missing}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sanitizers = os.environ.get("TDKD_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-g", "-fno-sanitize-recover"] if sanitizers else []
    kernels = CppExtension(
        "tdkd._C",
        sorted(map(str, Path("csrc").glob("*.cpp"))),
        depends=sorted(map(str, Path("csrc").glob("*.h"))),
        extra_compile_args=CXX_FLAGS + ABI_FLAGS + sanitize,
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
