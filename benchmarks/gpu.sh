#!/usr/bin/env bash
# Everything that a GPU can prove and measure, in one command of at most 9 minutes, without network:
#     benchmarks/gpu.sh                 results in ${OUT:-benchmarks/results}, a short table last
#     REHEARSE=1 benchmarks/gpu.sh      the same stages on CPU at tiny shapes (build/rehearsal)
# ${PYTHON:-python3} must hold torch; STAGES="bench table" runs these alone. Left out unless named:
# tune, for an architecture that is new, and routes, for the bounds of tdkd/kernels/routes.py and
# losses on the sets of 8,192 rows in benchmarks/sets. Every stage has a limit, and none that fails or
# runs late costs the others. Exits with 0 where all of them passed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
STAGES=${STAGES:-environment tests bench breakdown sanitizer verify build table}
REHEARSE=${REHEARSE:-}
LIMIT=${LIMIT:-510}  # seconds in all, but for the table
if [[ -n $REHEARSE ]]; then
    OUT=${OUT:-build/rehearsal}
    export DEVICE=cpu TRITON_INTERPRET=1 OMP_NUM_THREADS=1
else
    OUT=${OUT:-benchmarks/results}
    export DEVICE=cuda
    unset TRITON_INTERPRET
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[[ -n $REHEARSE ]] || nvidia-smi >/dev/null || {
    echo "gpu.sh: expected a GPU, for nvidia-smi finds none here; nothing was run or removed" >&2
    exit 2
}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
# What a stage writes goes before it, so that no earlier result is taken for this run's; those of
# stages that were not asked for stay.
rm -f "$OUT"/gpu{.log,-summary.txt}
touch "$OUT/gpu-summary.txt"
for stage in $STAGES; do
    case $stage in
    environment | tune | breakdown) rm -f "$OUT/gpu-${stage/%tune/tuned}.json" ;;
    bench) rm -f "$OUT"/gpu{.json,.png} ;;
    routes) rm -f "$OUT"/gpu-{routes,sets}.{json,png} ;;
    esac
done

left() { echo $((LIMIT - SECONDS)); }

# What this machine has.
environment() {
    nvidia-smi || [[ -n $REHEARSE ]] || return 1
    $PYTHON - <<'PYTHON'
import json, os, pathlib, platform
from importlib.metadata import version, PackageNotFoundError

from tdkd.benchmark.report import environment

found = environment(os.environ["DEVICE"])
packages = ("numpy", "setuptools", "ninja", "pytest", "pytest-xdist", "hypothesis", "transformers",
            "matplotlib", "typer", "rich", "liger-kernel", "triton")
for package in packages:
    try:
        found["versions"][package] = version(package)
    except PackageNotFoundError:
        found["versions"][package] = None
text = json.dumps(found, indent=2)
print(text)
pathlib.Path(os.environ["OUT"], "gpu-environment.json").write_text(text + "\n")
PYTHON
}

# The CPU kernels, in place.
build() {
    $PYTHON setup.py -q build_ext --inplace && return
    # setuptools before 77 cannot read this pyproject.toml
    local scratch=$LOGS/build
    mkdir -p "$scratch/tdkd" && cp -r setup.py csrc "$scratch" && touch "$scratch/tdkd/__init__.py" &&
        printf '[metadata]\nname = tdkd\n[options]\npackages = tdkd\n' >"$scratch/setup.cfg" &&
        (cd "$scratch" && $PYTHON setup.py -q build_ext --inplace) && cp "$scratch"/tdkd/_C*.so tdkd/
}

# Most of the time of a test is spent in the compiler, for which there are cores.
tests() {
    local options=(-q -p no:cacheprovider -p told --durations=8) files=(tests/gpu tests/test_triton.py)
    if [[ -n $REHEARSE ]]; then
        options+=(-k "empty_shapes or infinite")
    else
        $PYTHON -c "import xdist" 2>/dev/null && options+=(-n "$(($(nproc) > 14 ? 14 : $(nproc)))")
        $PYTHON -c "import pytest_timeout" 2>/dev/null && options+=(--timeout 100)
    fi
    PYTHONPATH="$PYTHONPATH:benchmarks" $PYTHON -m pytest "${options[@]}" "${files[@]}"
}

# Drawn cases, every op in a process of its own; in one more opcheck, torch.compile, memory, graphs.
verify() {
    local ops op pid status=0 pids=()
    ops=$($PYTHON -c "from tdkd.verify import SUBJECTS; print(*SUBJECTS)") || return 1
    [[ -n $REHEARSE ]] && ops=soft_value
    for op in $ops; do
        $PYTHON -m tdkd verify --device "$DEVICE" --cases 12 --op "$op" &
        pids+=($!)
    done
    if [[ -z $REHEARSE ]]; then
        $PYTHON -m tdkd verify --device "$DEVICE" --cases 1 &
        pids+=($!)
    fi
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    return $status
}

breakdown() {
    [[ -n $REHEARSE ]] && return 77
    $PYTHON benchmarks/breakdown.py --budget 40 --output "$OUT/gpu-breakdown.json"
}

# Every op once, small, forward and backward, under memcheck.
sanitizer() {
    local tool=()
    if [[ -z $REHEARSE ]]; then
        local found
        found=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer) || {
            echo "compute-sanitizer is not here"
            return 77
        }
        tool=("$found" --tool memcheck --error-exitcode 9)
    fi
    # without torch's cache every tensor has bounds of its own
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" "$PYTHON" - <<'PYTHON'
import os

import torch

from tdkd import ops
from tdkd.objectives import ForwardKL

torch.manual_seed(0)
device = os.environ["DEVICE"]
for dtype in (torch.bfloat16, torch.float32):
    student = torch.randn(33, 5003, device=device).to(dtype).requires_grad_()
    teacher = (torch.randn(33, 5003, device=device) * 3).to(dtype)
    tokens = torch.randint(5003, (33,), device=device)
    tokens[5] = -100
    ops.td_loss(student, teacher, tokens, k=64, impl="fused").loss.backward()
    assert student.grad.isfinite().all()
q = torch.randn(33, 70, device=device, requires_grad=True)
value = ops.soft_value(q, impl="fused")
successor = torch.arange(1, 34, device=device)
successor[-1] = -1
ops.td_target(value, successor, lam=0.9, impl="fused").sum().backward()
ids = torch.randint(5003, (33, 64), device=device, dtype=torch.int32)
ops.gather_q(student, ids, impl="fused").sum().backward()

# from hidden states and heads; 16 ids are gathered from 5,003, and 64 are not
columns = ops.sampled_vocabulary(5003, 256, device=device)
ways = (
    {"objective": ForwardKL(tail=True)},
    {"objective": ForwardKL(tail=True), "normaliser": "batch", "extra": 256, "law": "student"},
    {"objective": ForwardKL(tail=True), "normaliser": "sampled", "vocabulary": columns},
    {"objective": ForwardKL(tail=True), "reduction": "none", "softcap": 5.0},
    {"objective": ForwardKL(), "q": "logit"},
)
for dtype, mixed in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
    hidden, head, bias = (
        torch.randn(*shape, device=device).to(dtype).requires_grad_()
        for shape in ((33, 96), (5003, 96), (5003,))
    )
    options = {"bias": bias, "impl": "fused"}
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        actions = ops.linear_select_actions(
            hidden, head, 64, 0.9, include=tokens.clamp(min=-1), **options
        )
        for way in ways:
            out = ops.linear_td_loss(hidden, head, tokens, actions=actions, **way, **options)
            out.loss.sum().backward()
        for k in (16, 64):
            ops.linear_gather_q(hidden, head, ids[:, :k], **options).sum().backward()
        given = ops.linear_log_probs(hidden, head, ids, **options)
        (given.log_probs.sum() + given.log_tail.sum()).backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in (hidden, head, bias))
print("done:", float(q.grad.sum()))
PYTHON
}

tune() {
    if [[ -n $REHEARSE ]]; then
        $PYTHON benchmarks/tune.py --device cpu --rows 1 --vocab 300 --k 4 --rounds 1 \
            --output "$OUT/gpu-tuned.json"
    else
        $PYTHON benchmarks/tune.py --budget 55 && cp tdkd/kernels/tuned.json "$OUT/gpu-tuned.json"
    fi
}

bench() { timed --suite gpu --name gpu --budget "$BUDGET"; }

# Every way that the rule of tdkd/kernels/routes.py chooses from; then losses on a teacher's sets.
routes() {
    local file options=()
    for file in benchmarks/sets/*.npz; do options+=(--sets "$file"); done
    timed --suite gpu-routes --name gpu-routes --budget "$BUDGET" &&
        timed --suite gpu --op linear_td_loss --name gpu-sets --budget 60 --no-compile "${options[@]}"
}

timed() {
    local options=(--device "$DEVICE" --output "$OUT")
    [[ -n $REHEARSE ]] && options+=(--rows 8 --vocab 512 --rounds 2 --no-compile)
    $PYTHON -m tdkd.benchmark "${options[@]}" "$@"
}

# The short table, and the picture where the benchmark was cut off before it.
table() {
    [[ -f $OUT/gpu-tuned.json ]] && echo "tuned: $(tr -d ' \n' <"$OUT/gpu-tuned.json")"
    $PYTHON -m tdkd.benchmark --show "$OUT/gpu.json"
}

# stage NAME SECONDS: runs the function, and writes down how it went.
stage() {
    local name=$1 limit=$2 began=$SECONDS verdict
    [[ " $STAGES " == *" $name "* ]] || return 0
    if ((limit > $(left))); then limit=$(left); fi
    if ((limit < 5)); then
        verdict="no time left"
    else
        echo "==> $name (at most $limit s)"
        timeout -k 5 "$limit" bash -c "$FUNCTIONS; $name" >"$LOGS/$name.log" 2>&1 </dev/null
        local status=$?
        case $status in
        0) verdict=passed ;;
        77) verdict="not here" ;;
        124 | 137) verdict="out of time" ;;
        *) verdict="failed ($status)" ;;
        esac
    fi
    {
        echo "===== $name: $verdict, $((SECONDS - began)) s"
        [[ -f $LOGS/$name.log ]] && tail -c 200000 "$LOGS/$name.log"
    } >>"$OUT/gpu.log"
    printf '%-14s %-14s %4d s\n' "$name" "$verdict" "$((SECONDS - began))" >>"$OUT/gpu-summary.txt"
    # the end of what went wrong is worth its lines
    [[ $verdict == passed || $verdict == "not here" || $name == table ]] ||
        { [[ -f $LOGS/$name.log ]] && tail -n 25 "$LOGS/$name.log"; }
}

export PYTHON REHEARSE LOGS
FUNCTIONS=$(declare -f environment build tests tune bench routes timed breakdown sanitizer verify table)

# Seconds of a stage that is timed: what is left, but for so many of those that follow.
budget() {
    BUDGET=$(($(left) - $1))
    ((BUDGET > 230)) && BUDGET=230
    ((BUDGET < 60)) && BUDGET=60
    export BUDGET
}

stage environment 30
stage tests 200
stage tune 80
budget 130
stage bench $((BUDGET + 30))
budget 100
stage routes $((BUDGET + 90))
stage breakdown 60
# nothing is timed any more: these two share the machine
stage sanitizer "$(left)" &
stage verify "$(left)" &
wait
stage build "$(left)"  # what it writes, they would import
LIMIT=$((SECONDS + 25))
stage table 25
echo
[[ -f $LOGS/table.log ]] && cat "$LOGS/table.log"
echo
cat "$OUT/gpu-summary.txt"
! grep -qvE '^[a-z_]+ +(passed|not here) ' "$OUT/gpu-summary.txt"
