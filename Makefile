# Two commands: `make demo` and `make test`. Both install what they need first (contrib/setup.sh; Debian packages,
# by sudo where you are not root) and build. `make help` lists the rest.

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Tools that ordinary users' PATH often lacks: mkfs.ext4, debugfs, losetup; and a toolchain that rustup installed.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:$(HOME)/.cargo/bin
# The binary that the tests mount with and that demo and bench run.
export VMDKFUSE_BIN := $(TARGET_DIR)/release/vmdkfuse

# A mount namespace of their own for the tests, where this user may create one: a namespace that another process creates
# meanwhile then holds no copy of their mounts, which would keep a daemon alive after its mount was unmounted.
UNSHARE := $(shell unshare -m true 2>/dev/null && echo unshare -m)
CARGO_DENY := $(TARGET_DIR)/tools/bin/cargo-deny

BENCH_ARGS ?=

.PHONY: help build demo test deny bench bench-quick clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

build: ## build the release binary
	cargo build --release --locked

demo: ## make a VMDK with a file system in it, mount it, read it, write to it, unmount it
	./contrib/demo.sh

# With VMDKFUSE_REQUIRE=all what a test needs and is missing (a tool, root) fails the test instead of skipping it;
# an ordinary user can say `make test VMDKFUSE_REQUIRE=` to skip, loudly, what needs root.
test: export VMDKFUSE_REQUIRE ?= all
test: ## formatting, lints, docs, the demo and every test
	./contrib/setup.sh test
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps
	$(MAKE) deny
	cargo build --release --locked
	./contrib/demo.sh
	cargo test --locked --workspace --doc
	cargo test --locked --no-default-features --lib
	$(UNSHARE) cargo test --locked --workspace --no-fail-fast --lib --tests

deny: $(CARGO_DENY) ## licences, sources and bans of the dependencies; advisories where their database can be fetched
	$(CARGO_DENY) --locked check licenses bans sources
	@if timeout 60 $(CARGO_DENY) fetch db 2>/dev/null; then $(CARGO_DENY) --locked check --disable-fetch advisories; \
	else echo 'deny: the database of advisories cannot be fetched here, so advisories are NOT checked'; fi

# Built without optimization: that takes a fifth of the time, and it runs for a second.
$(CARGO_DENY):
	cargo install --locked --debug --root '$(TARGET_DIR)/tools' --version 0.20.2 cargo-deny

bench: ## measure beside the peers that Debian packages (root; some 20 minutes); BENCH_ARGS='--help' for more
	./contrib/setup.sh bench
	cargo build --release --locked
	python3 -B contrib/bench/bench.py --contender '$(VMDKFUSE_BIN)' $(BENCH_ARGS)

bench-quick: ## the same in a minute: small disk, one round; shows that it works, not how fast
	$(MAKE) bench BENCH_ARGS='--quick $(BENCH_ARGS)'

clean: ## remove what was built
	cargo clean
