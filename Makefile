# Needs Python 3.11 or 3.12 and make. Everything goes into .venv; nothing else is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
CORES ?= all
# Test processes; a test file stays within one.
WORKERS ?= 2
# More words for pytest.
PYTEST ?=
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-unit test-faults test-slurm ratios lint real-run real-video install-pixel3dmm clean help

help:
	@echo "make setup      create $(VENV) with pinned versions"
	@echo "make demo       whole workflow on procedural people, minutes on a CPU"
	@echo "make test       all tests but the two kinds below;  make test-unit: the fast ones;  make lint: linters only"
	@echo "make test-faults  what breaks is mended: kills, full disks, damaged files"
	@echo "make test-slurm tests on a throw-away SLURM on this machine (root on Debian)"
	@echo "make ratios     fast paths against their plain twins on the CPU; fails where one became slower"
	@echo "make real-run   workflow on real data in CAP4D_REAL_DATA"
	@echo "make real-video avatars of real photos and of a real video alone, without diffusion"
	@echo "make install-pixel3dmm  an alternative tracker, in an environment of its own"
	@echo "make clean      remove what demo and tests made (not $(VENV))"

setup: $(STAMP)

# Nothing is done while the stamp is newer than what it depends on.
$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 or 3.12; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement requirements-dev.txt
	$(RUN) -m pip install --no-deps --no-build-isolation --editable .
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) -m snakemake --cores $(CORES)
	@$(RUN) -m cap4d_core summary

test: $(STAMP)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not full_size and not slurm" --ignore tests/faults

# No Snakemake runs, nothing that takes minutes.
test-unit: $(STAMP)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not workflow and not slurm and not full_size"

# Kills, full disks, damaged files: minutes each.
test-faults: $(STAMP)
	$(RUN) -m pytest -rs $(PYTEST) tests/faults

# Installs Debian's SLURM where it is missing, and starts a cluster of two nodes with pretended GPUs.
test-slurm: $(STAMP)
	$(RUN) -m pytest -m slurm -rs --session-timeout 1800 $(PYTEST) tests/slurm

# Half a minute; renew what is expected with: python -m benchmarks.ratios --write
ratios: $(STAMP)
	$(RUN) -m benchmarks.ratios --check

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/snakefmt --check Snakefile rules
	$(RUN) -m snakemake --lint

real-run: $(STAMP)
	$(RUN) tests/real_run/make_small_mmdm.py
	$(RUN) -m snakemake --cores $(CORES) --configfile tests/real_run/config.yaml
	@$(RUN) -m cap4d_core summary --configfile tests/real_run/config.yaml

# Avatars of photos and of a video alone, tracked here.
real-video: $(STAMP)
	$(RUN) -m snakemake --cores $(CORES) --configfile tests/real_run/video.yaml

# An alternative tracker, in an environment of its own: docs/tracking.md.
install-pixel3dmm: $(STAMP)
	tools/install_pixel3dmm.sh $(PIXEL3DMM_PATH)

clean:
	rm -rf results results-real debug build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
