# Each verb does its own set-up in .venv; nothing is needed beforehand but Python >= 3.11 and make.
PYTHON ?= python3
# pip would compile all modules, which takes most of its time; Python compiles those that it imports.
PIP = -m pip --disable-pip-version-check --quiet install --no-compile
INSTALL = .venv/bin/python $(PIP) --constraint constraints.txt
INSTALL_OLDEST = .venv-oldest/bin/python $(PIP) --constraint constraints-oldest.txt
BIN = .venv/bin

.PHONY: demo test test-oldest lint docs dist bench gpu gpu-packages clean

demo: .venv/.demo
	$(BIN)/python examples/plot_quickstart.py

# Two processes of one thread each: networks in the tests are too small for two threads. Each starts
# with half of the files, whose fixtures it keeps, and takes over tests of the other when it is done.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test: .venv/.dev
	$(PYTEST)

# To save time, these run with the newest dependencies alone: the examples of docstrings and README;
# runtimes, whose floors are the newest versions; checks of the source; losses, passes through a
# shared network and options of training, whose torch is the same; ray, peft and skl2onnx, whose floor
# is the newest version; and the behaviour of networks, kernels and gates, members of ensembles,
# reports, crashes, saved pipelines and the example of a service. Other tests reach the same
# interfaces of the dependencies: test_common.py fits every estimator, test_training.py covers skorch,
# test_projection.py and the tests of unions the routing of metadata, test_huggingface.py transformers,
# and test_store.py the store.
NEWEST_ONLY = readme pages runtimes exported onnx scale architecture losses crossmodal segmentation \
	evaluation leaks modality_report encoder_ranking finetune faults serving saved_pipelines \
	model_card ensemble long_tables adaptations joint projection_options fusion kernel gate
test-oldest: BIN = .venv-oldest/bin
test-oldest: ARGS = tests $(NEWEST_ONLY:%=--ignore=tests/test_%.py)
test-oldest: .venv-oldest/.dev
	$(PYTEST)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going -j 2 -b html docs docs/_build/html

# The sdist and the wheel, checked and run outside the repository; ARGS="--tests" runs the tests too.
dist:
	$(PYTHON) tools/build_dist.py $(ARGS)

bench: .venv/.bench
	$(BIN)/python examples/benchmarks/bench_encode.py --json docs/benchmarks/encode.json
	$(BIN)/python examples/benchmarks/bench_store.py --json docs/benchmarks/store.json
	$(BIN)/python examples/benchmarks/bench_grid_search.py --fast --json docs/benchmarks/grid_search.json
	$(BIN)/python examples/benchmarks/bench_projector.py --json docs/benchmarks/projector.json
	$(BIN)/python examples/benchmarks/bench_adaptation.py full --json docs/benchmarks/adaptation.json
	$(BIN)/python examples/benchmarks/bench_adaptation.py sensitivity --folds 3 --json docs/benchmarks/sensitivity.json
	$(BIN)/python examples/benchmarks/bench_adaptation.py modalities --json docs/benchmarks/modalities.json
	$(BIN)/python examples/benchmarks/bench_adaptation.py targets --json docs/benchmarks/targets.json
	$(BIN)/python examples/benchmarks/bench_fusion.py fusion --json docs/benchmarks/fusion.json
	$(BIN)/python examples/benchmarks/bench_fusion.py shift --json docs/benchmarks/shift.json
	$(BIN)/python examples/benchmarks/bench_fusion.py speed --json docs/benchmarks/speed.json
	$(BIN)/python examples/benchmarks/bench_fusion.py efficiency --json docs/benchmarks/efficiency.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py retrieval --json docs/benchmarks/retrieval.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py zero_shot --folds 3 --json docs/benchmarks/zero_shot.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py pairs --folds 3 --json docs/benchmarks/pairs.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py probe --folds 3 --json docs/benchmarks/probe.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py shared_shift --folds 3 --seeds 3 --json docs/benchmarks/shared_shift.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py frontier --folds 3 --json docs/benchmarks/frontier.json
	$(BIN)/python examples/benchmarks/bench_crossmodal.py crossmodal_cost --json docs/benchmarks/crossmodal_cost.json
	$(BIN)/python examples/benchmarks/bench_predictor.py --json docs/benchmarks/predictor.json
	$(BIN)/python examples/benchmarks/bench_predictor.py --second-run --json docs/benchmarks/second_run.json
	$(BIN)/python examples/benchmarks/bench_predictor.py --scale --json docs/benchmarks/predictor_scale.json
	$(BIN)/python examples/benchmarks/bench_few_label.py --json docs/benchmarks/few_label.json
	$(BIN)/python examples/benchmarks/bench_reports.py --every 2 --seeds 3 --json docs/benchmarks/reports.json
	$(BIN)/python examples/benchmarks/bench_leaks.py --json docs/benchmarks/leaks.json
	$(BIN)/python examples/benchmarks/bench_finetuning.py --shuffled --json docs/benchmarks/finetuning.json
	$(BIN)/python examples/benchmarks/bench_segmentation.py --json docs/benchmarks/segmentation.json
	$(BIN)/python examples/benchmarks/bench_service.py --json docs/benchmarks/service.json
	$(BIN)/python examples/benchmarks/bench_long_arrays.py --json docs/benchmarks/long_arrays.json
	$(BIN)/python examples/benchmarks/bench_scale.py --json docs/benchmarks/scale.json
	$(BIN)/python examples/benchmarks/bench_faults.py --json docs/benchmarks/faults.json

# The tests and the benchmark for a GPU, by PYTHON; ARGS="--device cpu --fast" is a dry run.
gpu:
	PYTHON=$(PYTHON) tools/gpu.sh $(ARGS)

# An archive of what a machine without network may lack; copy it to .gpu there.
gpu-packages: .venv/.demo
	$(BIN)/python tools/pack_gpu.py

clean:
	rm -rf .venv .venv-oldest dist docs/_build docs/api docs/auto_examples

.venv/.python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "sklembed needs Python >= 3.11; $(PYTHON) is older. Run: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# constraints.txt pins what the project is tested with. torch comes first and alone, so that no other
# package picks a build of it.
.venv/.torch: .venv/.python constraints.txt
	$(INSTALL) torch
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[demo]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[demo,dev]'
	touch $@

.venv/.bench: .venv/.dev
	$(INSTALL) --editable '.[bench]'
	touch $@

.venv/.docs: .venv/.dev
	$(INSTALL) --editable '.[demo,dev,docs]'
	touch $@

.venv-oldest/.dev: .venv/.python constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	$(INSTALL_OLDEST) torch
	$(INSTALL_OLDEST) --editable '.[demo,test]'
	touch $@
