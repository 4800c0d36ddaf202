# `make demo` and `make test` first install the Debian packages that they need (contrib/setup.sh; through sudo if you are
# not root), then build. `make help` lists all targets.

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Folders that the PATH of an ordinary user often lacks: those of mkfs.ext4, debugfs and losetup, and that of rustup.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(HOME)/.cargo/bin
# The binary that the tests, the demo and the benchmark run.
export VMDKFUSE_BIN := $(TARGET_DIR)/release/vmdkfuse
# The library that the tests preload into programs.
export BDWRAPPER_LIB := $(TARGET_DIR)/release/libvmware_bdwrapper.so

# Runs the tests in their own mount namespace if this user may create one. Otherwise a namespace that another process
# creates during a test would hold a copy of its mount, and keep the daemon alive after the unmount.
UNSHARE := $(shell unshare -m true 2>/dev/null && echo unshare -m)
CARGO_DENY := $(TARGET_DIR)/tools/bin/cargo-deny

BENCH_ARGS ?=

.PHONY: help build demo test manual deny bench bench-quick clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

build: ## build the release binary
	cargo build --release --locked

demo: ## create a VMDK with a file system, mount it, read it, write to it, unmount it
	./contrib/demo.sh

# With VMDKFUSE_REQUIRE=all a test whose requirement (a tool, root) is missing fails instead of being skipped. An ordinary
# user runs `make test VMDKFUSE_REQUIRE=` to skip the tests that need root; each of them prints a notice.
test: export VMDKFUSE_REQUIRE ?= all
test: ## check formatting, lints and docs, run the demo and every test
	./contrib/setup.sh test
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps
	$(MAKE) deny
	cargo build --release --locked -p vmdkfuse -p vmware-bdwrapper
	./contrib/demo.sh
	cargo test --locked --workspace --doc
	$(UNSHARE) cargo test --locked --workspace --no-fail-fast --lib --tests

manual: ## write the manual pages and completions anew from the table of keys
	VMDKFUSE_WRITE_MANUAL=1 cargo test --locked --lib cli::manual

deny: $(CARGO_DENY) ## check licences, bans and sources of the dependencies, and advisories if their database is reachable
	$(CARGO_DENY) --locked check licenses bans sources
	@if timeout 60 $(CARGO_DENY) fetch db 2>/dev/null; then $(CARGO_DENY) --locked check --disable-fetch advisories; \
	else echo 'deny: cannot fetch the advisory database, so advisories are NOT checked'; fi

# Built without optimization: the build takes a fifth of the time, and the check runs only for a second.
$(CARGO_DENY):
	cargo install --locked --debug --root '$(TARGET_DIR)/tools' --version 0.20.2 cargo-deny

bench: ## compare with the peers that Debian packages (root; about 20 minutes); BENCH_ARGS='--help' lists options
	./contrib/setup.sh bench
	cargo build --release --locked
	python3 -B contrib/bench/bench.py --contender '$(VMDKFUSE_BIN)' $(BENCH_ARGS)

bench-quick: ## test the benchmark in a minute: small disk, one round; the figures mean nothing
	$(MAKE) bench BENCH_ARGS='--quick $(BENCH_ARGS)'

clean: ## remove all build output
	cargo clean
