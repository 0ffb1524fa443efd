# `make demo` shows Walden at work on a throw-away PostgreSQL; `make test` is what a change has to pass.
# Parts that are not on this machine go into .cache (see tests/setup): nothing is installed, no service is touched.
.DEFAULT_GOAL := help
.PHONY: help demo test test-full bench fmt lint setup
CARGO ?= cargo

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## stream, back up, lose the data, get it back: on a throw-away server, in about a minute after the build
	@tests/demo.sh

setup:
	@tests/setup/all.sh

test: setup lint ## formatter, linter and every test (live on PostgreSQL 13, 15, 17 and 18)
	$(CARGO) test --locked

test-full: ## the same on PostgreSQL 13 to 18, with the long runs, and the dependency check
	@tests/setup/all.sh full
	@$(MAKE) --no-print-directory lint
	WALDEN_TEST_FULL=1 $(CARGO) test --locked
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --offline --locked check bans licenses sources; \
	else echo "cargo-deny is not here: licences and sources of the dependencies were not checked"; fi

bench: ## whole runs and commits against PostgreSQL's own tools, as Markdown tables
	@benches/whole.sh
	@benches/tail.sh

fmt: ## format the code
	$(CARGO) fmt

lint: ## formatter and linter, nothing changed
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
