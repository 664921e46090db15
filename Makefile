VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint bench docs pylm clean

setup: $(STAMP)

# torch comes first and pinned: an unpinned request by another package would fetch CUDA builds of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[embedded,ray,audit,private,dev]"
	# What it asks for (numpy below 2) is out of date: it runs on ours. What it imports is named beside it.
	$(PY) -m pip install -q --disable-pip-version-check --no-deps dp-accounting==0.4.4 absl-py==2.5.1 dm-tree==0.1.10
	touch $(STAMP)

demo: setup
	$(VENV)/bin/brickyard compare --data embedded:stdlib-topics --methods moment-probing lora --max-length 32 --batch-size 8 --minutes 4.5 --seeds 3 --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

lint: setup
	$(VENV)/bin/ruff check brickyard tests benchmarks scripts
	$(VENV)/bin/ruff format --check brickyard tests benchmarks scripts
	$(VENV)/bin/pyright

bench: setup
	for file in benchmarks/*.py; do echo "== $$file"; $(PY) $$file || exit 1; done

docs: setup
	$(PY) scripts/make_docs.py

# The embedded language models, from the source that is installed here; interrupted, it goes on. About two hours.
pylm: setup
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[pylm]"
	test -f runs/pylm/corpus/sources.json || $(PY) scripts/pylm_corpus.py --out runs/pylm/corpus
	$(PY) scripts/train_pylm.py --out runs/pylm/base --tokens 30e6 --compile
	$(PY) scripts/train_pylm.py --out runs/pylm/small --size small --tokens 4e6 --compile
	$(PY) scripts/train_pylm.py --out runs/pylm/small-a --size small --tokens 4e6 --compile --seed 1 --half 0
	$(PY) scripts/train_pylm.py --out runs/pylm/small-b --size small --tokens 4e6 --compile --seed 2 --half 1
	$(PY) scripts/pylm_report.py runs/pylm/base/model brickyard/embedded/pylm \
		runs/pylm/small/model brickyard/embedded/pylm_small \
		runs/pylm/small-a/model brickyard/embedded/pylm_small_a \
		runs/pylm/small-b/model brickyard/embedded/pylm_small_b

clean:
	rm -rf $(VENV) runs
