# `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py
WORK_DIR := work_dirs/demo

.PHONY: help env demo test lint

help:
	@echo 'make demo  train and evaluate Mask R-CNN with FasterNet-T0 on real microscopy images'
	@echo 'make test  run all tests'
	@echo 'make env   just set up .venv'

env:
	@$(PYTHON) tools/env.py

demo: env
	@echo '==> Training on real images, from scratch: 3 to 6 minutes on two cores'
	$(BIN)/python -m fasternet_det.datasets.nuclei data/nuclei
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(WORK_DIR)
	$(BIN)/python tools/test.py $(CONFIG) $(WORK_DIR)/iter_120.pth --work-dir $(WORK_DIR)/test --show-dir pictures
	$(BIN)/python tools/report.py $(WORK_DIR)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	@echo '==> Running the tests: up to 12 minutes on two cores'
	$(BIN)/python -m pytest
