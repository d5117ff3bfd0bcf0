"""Compiles every Triton kernel for GPUs that are not here, and reads what came out.

    python benchmarks/compiled.py [--json FILE] [--target sm_90 ...]

For NVIDIA: registers, spills, shared memory, 16-byte loads in the main loop and its instructions a
logit, from the SASS. For AMD: registers and spills. Exits with 1 where a budget is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tdkd.kernels import rows, tuning
from tdkd.kernels.gather_q import triton as gather_q
from tdkd.kernels.linear_gather_q import triton as linear_gather_q
from tdkd.kernels.linear_rows import triton as linear_rows
from tdkd.kernels.select_actions import triton as select_actions
from tdkd.kernels.soft_value import triton as soft_value
from tdkd.kernels.student_rows import triton as student_rows
from tdkd.kernels.td_target import triton as td_target

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHIFTS = {"bfloat16": 16, "float16": 13, "float32": 0}
VOCAB = 151_936
BY_DTYPE = ("select_stream", "select", "student_stream", "student_finish", "student_grad")
KERNELS = (
    *BY_DTYPE,
    "scatter",
    "gather",
    "soft_value",
    "soft_value_grad",
    "td_step",
    "td_double",
    "td_spread",
    "td_gradients",
    "head_products",
    "head_by_hidden",
    "head_lay_out",
    "head_by_head",
    "head_join",
    "forward_kl",
)

BUDGETS = {
    # instructions of a thread a logit in the main loop, 16-bit and 32-bit logits; registers
    "select_stream": (9.5, 10.0, 128),
    "student_stream": (13.5, 19.0, 64),
    "student_grad": (10.5, 8.5, 64),
    # kernels without a main loop
    "select": (None, None, 128),
    "student_finish": (None, None, 64),
    "head_products": (None, None, 80),
}
"""Of Triton 3.9, the pinned one. At full bandwidth an H100 can issue 19.7 instructions in the time
of one bfloat16 logit, twice as many in that of a float32 one. Registers are such that at least 16
warps fit a multiprocessor."""

PINNED = triton.__version__.startswith("3.9.")
OTHERS_SPILL, OTHERS_SLACK = 32, 1.02
"""Bytes, and a factor on instructions, that other releases of Triton are allowed: of all kernels
3.6 and 3.8 spill in one each, `select` at k = 1,024 (32) and `head_by_hidden` in float16 (8)."""


VARIANTS = {
    "ones": "each integer argument is 1, which a launch makes a constant",
    "odd": "no argument is divisible by 16",
    "capped": "a softcap and weights, and no optional argument",
}


class Job(NamedTuple):
    """One kernel at one size."""

    kernel: str
    dtype: str
    target: str
    k: int = 64
    variant: str = ""
    """one of VARIANTS, or the plain launch that budgets are for."""


class Report(NamedTuple):
    """What a compiled kernel takes; None where the target's tools do not tell."""

    kernel: str
    dtype: str
    target: str
    k: int
    variant: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int | None = None
    """16-byte loads from global memory in the main loop."""
    instructions_a_logit: float | None = None
    """of the main loop; None for kernels without one."""
    instructions: int | None = None
    """in the whole kernel, each counted once."""
    longest_loop: int | None = None
    """instructions of it."""


def jobs(targets: list[str]) -> Iterator[Job]:
    """Every kernel: all dtypes, large sets and variants on sm_90, bfloat16 elsewhere."""
    for target in targets:
        for kernel, dtype in itertools.product(KERNELS, DTYPES):
            by_dtype = kernel in BY_DTYPE or kernel.startswith("head")
            if dtype == "bfloat16" or (target == "sm_90" and by_dtype):
                yield Job(kernel, dtype, target)
        if target == "sm_90":
            yield Job("select", "bfloat16", target, 8)
            yield Job("select", "bfloat16", target, 1024)
            yield Job("select", "float32", target, 1024)
            yield Job("student_finish", "bfloat16", target, 1024)
            yield Job("scatter", "bfloat16", target, 1024)
            yield Job("forward_kl", "bfloat16", target, 1024)
            for kernel, variant in itertools.product(KERNELS, VARIANTS):
                yield Job(kernel, "bfloat16", target, variant=variant)


def kernel_of(job: Job) -> tuple[Any, dict[str, Any], int, int]:
    """The function, its constants, warps, and the logits of a tile (0: it has no main loop)."""
    k = triton.next_power_of_2(max(job.k, 16))
    group = select_actions.group_size(VOCAB, job.k)
    plain = {"CAPPED": False, "HAS_STATE": True}
    if job.kernel in tuning.CHOICES:
        heavy = job.variant in ("odd", "capped")
        launch = tuning.config(job.kernel, torch.device("cpu"), heavy)
        plain |= {"BLOCK": launch.block, "STAGES": launch.num_stages}
        if job.kernel == "select_stream":
            function, extra = select_actions._stream, {"GROUP": group}
        elif job.kernel == "student_stream":
            function = student_rows._stream
            extra = {"GROUP": student_rows.GROUP, "HAS_WEIGHT": False}
        else:
            function, extra = student_rows._gradient, {"HAS_WEIGHT": False}
        return function, plain | extra, launch.num_warps, launch.block
    if job.kernel == "select":
        held = select_actions.blocks(job.k)
        extra = {"HAS_TAKEN": True, "CAP": held.cap, "CHUNK": held.chunk, "GROUP": group}
        extra |= {"SPLITS": 1, "SHIFT": SHIFTS[job.dtype]}
        return select_actions._select, plain | extra, held.warps, 0
    if job.kernel == "student_finish":
        size = triton.next_power_of_2(triton.cdiv(VOCAB, student_rows.GROUP))
        extra = {"HAS_WEIGHT": False, "K": k, "SLOTS": 16, "GROUP": student_rows.GROUP}
        warps = student_rows.finish_warps(k, size)
        return student_rows._finish, plain | extra | {"GROUPS": size}, warps, 0
    if job.kernel == "scatter":
        return rows._scatter_rows, plain | {"K": k}, rows.slot_warps(k), 0
    if job.kernel == "gather":
        return gather_q._gather, {"CAPPED": False, "K": k}, 1, 0
    if job.kernel in ("soft_value", "soft_value_grad"):
        function = soft_value._soft_value if job.kernel == "soft_value" else soft_value._backward
        return function, {"K": k}, 1, 0
    steps = {
        "td_double": td_target._double,
        "td_spread": td_target._spread,
        "td_gradients": td_target._gradients,
    }
    if job.kernel == "forward_kl":
        constants = {"TAIL": True, "LOG_PROB": True, "K": k}
        return linear_rows._forward_kl, constants, rows.slot_warps(k), 0
    if job.kernel.startswith("head"):
        function = getattr(linear_gather_q, job.kernel.removeprefix("head"))
        columns = {"COLUMNS": linear_gather_q.columns_of(getattr(torch, job.dtype))}
        tile = {"TILE": linear_gather_q.TILE}
        extra = {
            "head_products": columns | {"HAS_BIAS": True, "SLOTS": linear_gather_q.PRODUCT_SLOTS},
            "head_by_hidden": columns | {"SLOTS": linear_gather_q.SLOTS},
            "head_lay_out": tile,
        }.get(job.kernel, columns | tile)
        return function, extra, linear_gather_q.WARPS, 0
    if job.kernel in steps:
        return steps[job.kernel], {"BLOCK": td_target._BLOCK}, 4, 0
    assert job.kernel == "td_step"
    constants = {"HAS_REWARD": True, "BOOTSTRAPS": True, "CHAINS": True, "BLOCK": td_target._BLOCK}
    return td_target._step, constants, 4, 0


POINTERS = {
    "level_ptr": "fp32",
    "total_ptr": "fp32",
    "weight_ptr": "fp32",
    "sums_ptr": "fp64",
    "z_ptr": "fp32",
    "log_probs_ptr": "fp32",
    "log_mass_ptr": "fp32",
    "entropy_ptr": "fp32",
    "loss_ptr": "fp32",
    "factor_ptr": "fp32",
    "grad_z_ptr": "fp32",
    "q_ptr": "fp32",
    "value_ptr": "fp32",
    "out_ptr": "fp32",
    "reward_ptr": "fp32",
    "b_ptr": "fp32",
    "c_ptr": "fp32",
    "s_ptr": "i64",
    "next_grad_ptr": "fp32",
    "next_b_ptr": "fp32",
    "next_c_ptr": "fp32",
    "next_s_ptr": "i64",
    "successor_ptr": "i64",
    "rest_ptr": "fp64",
    "log_rest_ptr": "fp64",
    "grad_rest_ptr": "fp64",
    "state_ptr": "i1",
    "taken_ptr": "i64",
    "members_ptr": "i64",
    "slot_ptr": "i64",
    "row_ptr": "i32",
    "g_ptr": "fp32",
    "begin_ptr": "i32",
    "room_ptr": "fp32",
    "bias_room_ptr": "fp32",
    "bias_ptr": "fp32",
    "list_ptr": "i32",
    "found_ptr": "i32",
    "ids_ptr": "i32",
    "count_ptr": "i32",
}
FLOATS = {"slope", "slope_log2e", "unit", "inner", "outer", "reach", "share", "carry"}
DIVISIBLE = {"outer_stride", "stride", "w_stride", "h_stride", "V", "H", "chunk"}


def signature(job: Job, function: Any, constants: dict[str, Any]) -> tuple[dict[str, str], dict]:
    """Types of the arguments, and which are divisible by 16, as a launch would find them."""
    types, divisible = {}, {}
    divided = DIVISIBLE | ({"groups"} if job.kernel.startswith("select") else set())
    for i, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("grad_ptr", "total_ptr", "value_ptr") and job.kernel.startswith("td_"):
            types[name] = "*fp32"
        elif name in ("out_ptr", "weight_ptr") and job.kernel.startswith("head"):
            types[name] = "*" + DTYPES[job.dtype]
        elif name == "order_ptr":
            types[name] = "*i64" if job.kernel == "scatter" else "*i32"
        elif name == "grad_ptr" and job.kernel.startswith(("soft_value_grad", "head")):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = "*" + POINTERS.get(name, DTYPES[job.dtype])
        elif name in FLOATS:
            types[name] = "fp32"
        else:
            types[name] = "constexpr" if job.variant == "ones" else "i32"
        if job.variant != "odd" and (
            name.endswith("_ptr") or (name in divided and not job.variant)
        ):
            divisible[(i,)] = [["tt.divisibility", 16]]
    return types, divisible


def compile_one(job: Job) -> Report | str:
    """The report, or what the compiler says against it."""
    try:
        return read_one(job)
    except triton.CompilationError as error:
        return str(error)


def read_one(job: Job) -> Report:
    function, constants, warps, tile = kernel_of(job)
    types, divisible = signature(job, function, constants)
    if job.variant == "capped":
        constants = {
            name: name in ("CAPPED", "HAS_WEIGHT") if isinstance(value, bool) else value
            for name, value in constants.items()
        }
    if job.variant == "ones":
        constants = {name: 1 for name, kind in types.items() if kind == "constexpr"} | constants
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=divisible)
    target = TARGETS[job.target]
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    told = (*job, warps)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills, scratch = (
            int(re.search(rf"{field}:?\s+(\d+)", text)[1])  # type: ignore[index]
            for field in (r"\.vgpr_count", r"\.vgpr_spill_count", r"\.private_segment_fixed_size")
        )
        return Report(*told, registers, 4 * spills + scratch, compiled.metadata.shared)
    usage, sass = disassembled(compiled.asm["cubin"])
    registers, stack, local = (
        int(re.search(rf"{f}:(\d+)", usage)[1]) for f in ("REG", "STACK", "LOCAL")
    )  # type: ignore[index]
    lines, loops = loops_of(sass)
    report = Report(
        *told,
        registers,
        stack + local,
        compiled.metadata.shared,
        instructions=len(lines),
        longest_loop=max(map(len, loops), default=None),
    )
    if not tile or job.variant:
        return report
    loop = main_loop(loops)
    wide = sum(bool(re.search(r"\bLDG\.E(\.\w+)*\.128", line)) for line in loop)
    return report._replace(
        wide_loads=wide, instructions_a_logit=round(len(loop) / (tile / (32 * warps)), 2)
    )


def disassembled(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        return tuple(  # type: ignore[return-value]
            subprocess.run(
                [tools / tool, option, file], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )


def loops_of(sass: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of a kernel, and those of each of its loops."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(lines)
        elif re.match(r"^\s+/\*[0-9a-f]+\*/", line):
            lines.append(line)
            jump = re.search(r"\bBRA(?:\.\w+)*\s.*?`\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(lines)))
    # a kernel ends in a jump to itself
    return lines, [lines[a:b] for a, b in loops if b - a > 8]


def main_loop(loops: list[list[str]]) -> list[str]:
    """The innermost loop that loads 16 bytes at once from global memory, or the longest one."""
    loading = [loop for loop in loops if any("LDG" in line for line in loop)]
    wide = [loop for loop in loading if any("LDG" in line and ".128" in line for line in loop)]
    return min(wide, key=len) if wide else max(loading or loops, key=len, default=[])


def broken(report: Report) -> list[str]:
    """What of the budgets a kernel does not keep."""
    found = []
    if report.spilled_bytes > (0 if PINNED else OTHERS_SPILL):
        found.append(f"spills {report.spilled_bytes} bytes")
    narrow, wide, registers = BUDGETS.get(report.kernel, (None, None, 64))
    if report.variant:
        registers = 192
    if report.registers > registers:
        found.append(f"{report.registers} registers, budget {registers}")
    if report.instructions_a_logit is not None:
        budget = wide if report.dtype == "float32" else narrow
        if report.instructions_a_logit > budget * (1.0 if PINNED else OTHERS_SLACK):
            found.append(f"{report.instructions_a_logit} instructions a logit, budget {budget}")
        if not report.wide_loads:
            found.append("no 16-byte loads in the main loop")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    wanted = list(jobs(options.target))
    failures = 0
    reports = []
    with ProcessPoolExecutor(options.workers) as pool:
        for job, report in zip(wanted, pool.map(compile_one, wanted), strict=True):
            if isinstance(report, str):
                failures += 1
                print(f"{job.target:7} {job.kernel:15} {job.dtype:9} does not compile:\n{report}")
                continue
            reports.append(report)
            wrong = broken(report)
            failures += bool(wrong)
            print(
                f"{report.target:7} {report.kernel:15} {report.dtype:9} k={report.k:<5} "
                f"{report.variant:6} "
                f"{report.warps:2} warps {report.registers:4} registers "
                f"{report.spilled_bytes:4} spilled {report.shared_bytes:6} shared  "
                f"{report.wide_loads or '':2} {report.instructions_a_logit or '':6} "
                f"{'; '.join(wrong)}",
                flush=True,
            )
    if options.json:
        told = {"triton": triton.__version__, "kernels": [r._asdict() for r in reports]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
