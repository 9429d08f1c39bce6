# Every check of the project; `.ci/run` calls `make ci`, which needs uv and a C++ compiler, nothing else.
PACKAGES := bs-patterns bs-memory bs-kernels bs-comm bs-modules
RUN := uv run --locked

.PHONY: ci lock lint test isolated sanitize docs build soak

ci: lock lint test isolated sanitize docs build

lock:  ## the lock is current and the installed set is consistent
	uv lock --check
	$(RUN) python tools/check_workspace.py
	uv pip check

lint:
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) lint-imports
	$(RUN) pyright

test:  ## what the README names
	uv run python -m pytest

isolated:  ## each package alone, with what it declares and nothing else; Triton's interpreter has run in `test`
	for package in $(PACKAGES); do \
		extra=; [ $$package = bs-modules ] && extra="--extra train"; \
		HYPOTHESIS_PROFILE=brief uv run --isolated --locked --package $$package $$extra --no-default-groups --group test \
			python -m pytest packages/$$package -q --deselect packages/bs-kernels/tests/test_triton_interpreted.py \
			|| exit 1; \
	done

sanitize:  ## the native core under the address and undefined-behaviour sanitizers
	BS_KERNELS_SANITIZE=1 $(RUN) python -m pytest -q packages/bs-kernels/tests/test_native_sanitizers.py

docs:
	$(RUN) sphinx-build -W --keep-going -q -b html docs docs/_build/html

build:  ## wheels and source distributions of all five packages
	rm -rf dist && uv build --all-packages --no-sources -q && ls dist

soak:  ## the long forms of the checks; its log is docs/benchmarks/soak.log
	HYPOTHESIS_PROFILE=soak $(RUN) python tools/soak.py
