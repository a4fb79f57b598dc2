# `make demo` and `make test` set everything up by themselves, in .venv; with
# TORCH=2.1.2 and the like, in .venv-torch2.1.2, with that version of torch.
PYTHON ?= python3
TORCH :=
BIN := .venv$(TORCH:%=-torch%)/bin
CONFIG := configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py
WORK_DIR := work_dirs/demo
OPTIONS :=

.PHONY: help env demo lint test

help:
	@echo 'make demo   train Mask R-CNN with FasterNet-T0 on tiles of a real micrograph'
	@echo 'make test   check style and run all tests'
	@echo 'make env    just set up .venv'

env:
	@TORCH="$(TORCH)" "$(PYTHON)" .ci/env.py

demo: env
	@echo '==> Training on tiles of a real micrograph, from scratch: 3 to 6 minutes on two cores'
	$(BIN)/python -m fasternet_det.datasets.nuclei data/nuclei
	$(BIN)/python tools/train.py $(CONFIG) --work-dir "$(WORK_DIR)" $(OPTIONS)
	@echo '==> Testing the saved checkpoint'
	$(BIN)/python tools/test.py $(CONFIG) "$$(cat "$(WORK_DIR)/last_checkpoint")" --work-dir "$(WORK_DIR)/test"
	@echo '==> Drawing what it finds'
	$(BIN)/python tools/report.py "$(WORK_DIR)" "$(WORK_DIR)/test"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	@echo '==> Running the tests: about 20 minutes on two cores'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
