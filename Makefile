# The list of commands. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
MM_STAMP := $(VENV)/.mm-installed
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup
MIM := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mim

.PHONY: help setup demo compare fashion fashion-compare frontier check test lint format bench bench-models clean mm mm-demo mm-demo-one

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the package (editable) and the developer tools

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard mambascope/ops/native/*.cpp mambascope/ops/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77,<81" wheel
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)  ## train the coarse-to-fine classifier on the built-in data and write its report
	$(BIN)/python tools/train_cls.py

compare: $(STAMP)  ## train, evaluate and time all methods on the built-in data and draw them (about an hour on two cores)
	$(BIN)/python tools/compare.py scopedigits --out benchmarks/results/comparison

# The pieces are those of fashion-compare, which goes on from them.
fashion: $(STAMP)  ## train MambaScope and Vim on Fashion-MNIST, one seed, and write the report to runs/fashion (DOWNLOAD=1 fetches the data)
	$(if $(DOWNLOAD),$(BIN)/python -c "from mambascope.data import SmallImageDataModule as M; M(download=True).prepare_data()")
	$(BIN)/python tools/compare.py fashion --entries vim mambascope --seeds 0 --out runs/fashion
	$(BIN)/python tools/eval_cls.py $$(ls -td runs/compare/fashion/trainings/mambascope-*-seed0 | head -1) \
		--target-acc-drop 0 --out runs/fashion/report

fashion-compare: $(STAMP)  ## the same as compare on Fashion-MNIST (about eight hours on two cores with AVX2; resumable)
	$(BIN)/python tools/compare.py fashion --out benchmarks/results/fashion

frontier: compare fashion-compare  ## both comparisons

check: lint  ## lint, and run the tests that need no OpenMMLab (JOBS=1: one after the other)
	$(PYTEST) --ignore tests/mm

test: $(MM_STAMP)  ## run all tests (installs the OpenMMLab stack too)
	$(PYTEST)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the commands made, but not runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f mambascope/ops/native/*.so $(STAMP) $(MM_STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

bench: $(STAMP)  ## time kernels and models on this CPU against their peers, and write benchmarks/results/
	$(PIP) install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/scan_cpu.py
	$(BIN)/python benchmarks/vim_cpu.py
	$(MAKE) --no-print-directory bench-models

CPU_MODELS = vim_tiny_patch16_224 vim_small_patch16_224 mambascope_tiny_patch16_224 mambascope_small_patch16_224 \
	deit_tiny_patch16_224 deit_small_patch16_224 levit_128s levit_192 mobilenetv4_conv_medium tf_efficientnet_lite0 \
	efficientvim_m2 repvit_m0_9 cpubone_b0_bfrobust
LARGE_MODELS = vim_tiny_patch16_224 mambascope_tiny_patch16_224 deit_tiny_patch16_224 mobilenetv4_conv_medium \
	tf_efficientnet_lite0 efficientvim_m2 repvit_m0_9 cpubone_b0_bfrobust
LEVEL = $$($(BIN)/python -c "from mambascope.ops.native import library; print(library.info()['isa'])")

bench-models: $(STAMP)  ## time the demo's model in every form, and models of ImageNet size beside those of others
	$(BIN)/python tools/benchmark.py scopedigits vim_nano_patch8_64 --forms eager frozen compiled onnx bf16 int8 \
		--out benchmarks/results/forms_$(LEVEL)
	$(BIN)/python tools/benchmark.py $(CPU_MODELS) --batch 1 8 --out benchmarks/results/models_$(LEVEL)
	for side in 512 1024; do $(BIN)/python tools/benchmark.py $(LARGE_MODELS) --img-size $$side --batch 1 --rounds 7 \
		--out benchmarks/results/models_$(LEVEL)_$$side || exit 1; done

mm: $(MM_STAMP)  ## install the OpenMMLab stack; builds mmcv the first time (about 10 minutes on two cores)

# Without nvcc the CUDA operators cannot be built, so the GPU is hidden from the build and mmcv gets the CPU ones.
$(MM_STAMP): $(STAMP)
	$(PIP) install --quiet --constraint constraints.txt ninja psutil
	command -v nvcc >/dev/null || export CUDA_VISIBLE_DEVICES=; \
	MMCV_WITH_OPS=1 $(PIP) install --quiet --no-build-isolation --constraint constraints.txt mmcv
	$(PIP) install --quiet --constraint constraints.txt --editable ".[mm]"
	touch $@

mm-demo: $(MM_STAMP)  ## train, test, sweep and draw the segmentation and detection demos (about 15 minutes; VIM=1 also trains plain Vim)
	$(BIN)/python -m mambascope.mm.demo_data
	$(MAKE) mm-demo-one PACKAGE=mmseg NAME=upernet IMAGES=data/scopedigits_seg/images/validation
	$(MAKE) mm-demo-one PACKAGE=mmdet NAME=cascade IMAGES=data/scopedigits_det/val2017

LAST = $$(cat work_dirs/$(NAME)_$(1)_demo/last_checkpoint)

mm-demo-one:
	$(if $(VIM),$(MIM) train $(PACKAGE) mm_configs/$(NAME)_vim_demo.py)
	$(MIM) train $(PACKAGE) mm_configs/$(NAME)_scope_demo.py
	$(MIM) test $(PACKAGE) mm_configs/$(NAME)_scope_demo.py --checkpoint $(call LAST,scope)
	$(BIN)/python tools/eval_dense.py mm_configs/$(NAME)_scope_demo.py $(call LAST,scope) \
		$(if $(VIM),--vim $(call LAST,vim))
	$(BIN)/python tools/predict_dense.py mm_configs/$(NAME)_scope_demo.py $(call LAST,scope) \
		$$(ls $(IMAGES)/*.jpg | head -8) --sheet --out work_dirs/$(NAME)_scope_demo/pictures
