# What one does here. `make` lists it.

# The first Python that runs and is new enough: a name on PATH may be a shim for a version that is not there.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	"$$python" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	&& echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/hotgraph/v1/*.proto)
SCRIPTS := .ci/run $(wildcard clients/*/*.sh tests/*/*.sh)
CODE := server clients/python graphcache benchmarks tests hatch_build.py
# On a machine that has torch, the stubs and no way to install anything, its own Python does; elsewhere .venv is set up.
GPU_NEEDS := $(if $(wildcard $(BIN)/python),protos,$(if $(wildcard protos/hotgraph/v1/*_pb2.py),,protos))
GPU_PYTHON = PYTHONPATH=protos:server:clients/python:.:$$PYTHONPATH $(if $(GPU_NEEDS),$(BIN)/python,python3)
GPU_RESULTS ?= benchmarks/results/gpu
AUDIT := .tools/audit
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo install protos protos-clients protos-cpp protos-go protos-java protos-node protos-rust vectors fmt check contract test \
	test-clients test-interop test-client-python test-client-cpp test-client-go test-client-java test-client-node test-client-rust \
	check-cpp check-go check-java check-node check-rust test-gpu sanitize test-soak bench bench-gpu bench-kernels sbom audit \
	clean

help: ## list what one can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.server ## set everything up, start the daemon, chat with a real model, stop it
	@$(BIN)/hotgraph demo

install: $(VENV)/.dev ## set up .venv with the package, its stubs and all tools

protos: $(VENV)/.dev ## generate the Python stubs again after an edit of protos/
	@$(BIN)/python hatch_build.py

protos-clients: protos protos-cpp protos-go protos-java protos-node protos-rust ## generate the stubs of all languages again

protos-cpp: ## generate the C++ stubs, which CMake does in every build: they fit one release of protobuf alone
	@clients/cpp/generate.sh

protos-go: $(VENV)/.dev ## generate the Go stubs, which are committed, again after an edit of protos/
	@clients/go/generate.sh

protos-node: $(VENV)/.dev ## generate the TypeScript stubs, which are committed, again after an edit of protos/
	@clients/node/generate.sh

protos-rust: $(VENV)/.dev ## generate the Rust stubs, which are committed, again after an edit of protos/
	@clients/rust/generate.sh

protos-java: ## generate the Java stubs, which the build makes too and nobody commits, from protos/
	@clients/java/generate.sh

vectors: $(VENV)/.dev protos ## make the golden wire vectors of tests/contract again after an edit of protos/
	@$(BIN)/python -m tests.contract.vectors

fmt: $(VENV)/.dev ## format the code and the protos
	@$(BIN)/ruff check --fix-only --quiet $(CODE)
	@$(BIN)/ruff format --quiet $(CODE)
	@$(BIN)/buf format --write protos

check: $(VENV)/.dev protos ## lint, types, import contracts, the wire contract
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy server/hotgraph_server clients/python/hotgraph_client graphcache hatch_build.py benchmarks tests
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking --against tests/contract/v1.binpb

contract: $(VENV)/.dev ## take the protos as they are for what later changes may not break
	$(BIN)/buf breaking --against tests/contract/v1.binpb
	$(BIN)/buf build --exclude-source-info --output tests/contract/v1.binpb

test: $(VENV)/.dev protos ## set everything up and pass all tests that need no GPU
	@tests/smoke/install_grpcurl.sh
	@tests/smoke/install_prometheus.sh || echo "the tests that need Prometheus are left out" >&2
	$(BIN)/python -m pytest -m "not gpu and not soak" $(TEST_ARGUMENTS)

# CONTRIBUTING.md says how the stress of mixed calls and faults among them, two minutes here, is run for a day.
test-soak: $(VENV)/.dev protos ## a quarter of an hour of kills, floods, overload and failures inside; the figures are printed
	$(BIN)/python -m pytest -m soak -s tests/reliability $(TEST_ARGUMENTS)

# A language's test command, run by tests/interop against real daemons. INTEROP_FLAGS=--record keeps what passed.
INTEROP := $(BIN)/python -m tests.interop $(INTEROP_FLAGS)
INTEROP_python := "python=$(BIN)/python -m pytest -q tests/interop/python_cases.py"
INTEROP_cpp := "cpp=clients/cpp/test.sh"
INTEROP_go := "go=clients/go/test.sh"
INTEROP_node := "node=clients/node/test.sh"
INTEROP_rust := "rust=clients/rust/test.sh"
INTEROP_java := "java=clients/java/test.sh"

CLIENTS ?= python cpp go java node rust
CHECK_CLIENTS := $(addprefix check-,$(filter-out python,$(CLIENTS)))
test-clients: $(VENV)/.dev protos $(CHECK_CLIENTS) ## the clients: Python's own tests, then all languages against real daemons
	$(BIN)/python -m pytest tests/client $(TEST_ARGUMENTS)
	$(INTEROP) $(foreach name,$(CLIENTS),$(INTEROP_$(name)))

test-interop: $(VENV)/.dev protos $(CHECK_CLIENTS) ## all CLIENTS against real daemons with a real model
	$(INTEROP) $(foreach name,$(CLIENTS),$(INTEROP_$(name)))

test-client-python: $(VENV)/.dev protos ## the Python client alone
	$(BIN)/python -m pytest tests/client $(TEST_ARGUMENTS)
	$(INTEROP) $(INTEROP_python)

test-client-cpp: $(VENV)/.dev protos check-cpp ## the C++ client alone
	$(INTEROP) $(INTEROP_cpp)

test-client-go: $(VENV)/.dev protos check-go ## the Go client alone
	$(INTEROP) $(INTEROP_go)

test-client-node: $(VENV)/.dev protos check-node ## the Node client alone
	$(INTEROP) $(INTEROP_node)

# Skips with a reason where protoc 3.21 is not the one on PATH, nor named by PROTOC.
check-cpp: $(VENV)/.dev protos ## does protoc 3.21, the oldest that C++ users have, take the protos?
	$(BIN)/python -m pytest -q -rs tests/contract/test_cpp.py

check-go: $(VENV)/.dev
	@clients/go/generate.sh --check

check-node: $(VENV)/.dev
	@clients/node/generate.sh --check

test-client-rust: $(VENV)/.dev protos check-rust ## the Rust client alone
	$(INTEROP) $(INTEROP_rust)

check-rust: $(VENV)/.dev
	@clients/rust/generate.sh --check

test-client-java: $(VENV)/.dev protos check-java ## the Java client alone
	$(INTEROP) $(INTEROP_java)

check-java:
	@clients/java/generate.sh --check

test-gpu: $(GPU_NEEDS) ## the tests that need an NVIDIA GPU
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu $(TEST_ARGUMENTS)

bench: $(VENV)/.dev protos ## tokens a second against transformers' generate, on this machine
	$(BIN)/hotgraph bench --compare-transformers $(BENCH_ARGUMENTS)

# Products take barriers, the ring of copies and early starts all together. Racecheck on attention reports what docs/kernels.md tells.
SANITIZED ?= tests/gpu/test_few_rows.py::test_odd_sizes tests/gpu/test_tile_rows.py::test_odd_sizes
sanitize: $(GPU_NEEDS) ## on an NVIDIA GPU: the kernels of products under compute-sanitizer
	for tool in memcheck racecheck synccheck; do \
	  $(firstword $(GPU_PYTHON)) PATH=$$PATH:/usr/local/cuda/bin compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(lastword $(GPU_PYTHON)) -m pytest -m gpu -p no:cacheprovider $(SANITIZED) || exit 1; done

bench-gpu: $(GPU_NEEDS) ## on an NVIDIA GPU: latency, what captures cost, ten minutes of storm; raw results to GPU_RESULTS
	$(GPU_PYTHON) -m benchmarks.gpu.latency --grpc --out $(GPU_RESULTS)/latency.json
	$(GPU_PYTHON) -m benchmarks.gpu.graphs --from-files --out $(GPU_RESULTS)/graphs.json
	$(GPU_PYTHON) -m benchmarks.gpu.interference --out $(GPU_RESULTS)/interference.json
	$(GPU_PYTHON) -m benchmarks.gpu.storm --out $(GPU_RESULTS)/storm.json

bench-kernels: $(GPU_NEEDS) ## on an NVIDIA GPU: floors, kernels, contexts and prompts of three models; raw results to GPU_RESULTS
	for config in llama2-7b llama3-8b smollm2; do for name in floor breakdown contexts; do \
		$(GPU_PYTHON) -m benchmarks.gpu.$$name --config $$config --out $(GPU_RESULTS)/$$name-$$config.json || exit 1; done; done

sbom: $(VENV)/.dev $(AUDIT)/.done ## write build/sbom.cdx.json: what is installed in .venv, as CycloneDX
	@mkdir -p build
	@$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --output-format JSON --output-file build/sbom.cdx.json $(BIN)/python

audit: $(VENV)/.dev $(AUDIT)/.done ## hold what is installed in .venv against the known vulnerabilities; needs PyPI's JSON interface
	@$(AUDIT)/bin/pip-audit --strict --skip-editable --progress-spinner off \
	  --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean: ## remove what was built; the models in the user's cache stay
	rm -rf $(VENV) .tools build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf clients/node/node_modules clients/node/dist clients/node/build clients/rust/target clients/java/*/target \
	  clients/cpp/build
	find protos -name '*_pb2*' -delete

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "hotgraph needs Python 3.11 or 3.12 on PATH (or PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Tools that must not stand among what they look at.
$(AUDIT)/.done:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

# Stamps: an install is done again when what it depends on has changed.
$(VENV)/.server: $(BIN)/python pyproject.toml hatch_build.py $(PROTOS)
	$(PIP_INSTALL) --editable '.[server]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml hatch_build.py $(PROTOS)
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.server
