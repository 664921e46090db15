VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint bench docs clean

setup: $(STAMP)

# torch comes first and pinned: an unpinned request by another package would fetch CUDA builds of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[embedded,ray,dev]"
	touch $(STAMP)

demo: setup
	$(VENV)/bin/brickyard compare --data embedded:stdlib-topics --methods moment-probing lora --max-length 32 --batch-size 8 --minutes 4.5 --seeds 3 --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

lint: setup
	$(VENV)/bin/ruff check brickyard tests benchmarks scripts
	$(VENV)/bin/ruff format --check brickyard tests benchmarks scripts
	$(VENV)/bin/pyright

bench: setup
	for file in benchmarks/*.py; do echo "== $$file"; $(PY) $$file || exit 1; done

docs: setup
	$(PY) scripts/make_docs.py

clean:
	rm -rf $(VENV) runs
