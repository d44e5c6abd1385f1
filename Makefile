.venv_path := .venv
build:
	PATH=$(CURDIR)/.venv/bin:$$PATH MAX_JOBS=2 flock .build.lock .venv/bin/python setup.py -q build_ext --inplace
.PHONY: build
