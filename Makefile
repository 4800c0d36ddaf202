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

# Where `make install` puts files. The helpers of mount(8) are always in /sbin: libmount looks there.
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
DATADIR ?= $(PREFIX)/share
UNITDIR ?= $(PREFIX)/lib/systemd/system
ZSHDIR ?= $(DATADIR)/zsh/site-functions
VERSION = $(shell sed -n '/^\[workspace.package\]/,/^version/s/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: help build install deb rpm deb-test rpm-test vendor-test demo test manual deny bench bench-quick clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

build: ## build the program and the library of bdwrapper
	cargo build --release --locked -p vmdkfuse -p vmware-bdwrapper

# Only if they are missing: `sudo make install` neither builds nor needs cargo.
$(VMDKFUSE_BIN) $(BDWRAPPER_LIB):
	cargo build --release --locked -p vmdkfuse -p vmware-bdwrapper

install: $(VMDKFUSE_BIN) $(BDWRAPPER_LIB) ## install program, helpers, manual, completions and unit; PREFIX=/usr/local, DESTDIR=
	install -D -m 0755 -s '$(VMDKFUSE_BIN)' '$(DESTDIR)$(BINDIR)/vmdkfuse'
	install -D -m 0644 -s '$(BDWRAPPER_LIB)' '$(DESTDIR)$(LIBDIR)/libvmware-bdwrapper.so.0'
	install -d -m 0755 '$(DESTDIR)/sbin' '$(DESTDIR)$(DATADIR)/doc/vmdkfuse/examples'
	for helper in mount umount; do for type in vmdkfuse fuse.vmdkfuse; do \
	  ln -sf '$(BINDIR)/vmdkfuse' "$(DESTDIR)/sbin/$$helper.$$type" || exit 1; done; done
	for page in man/vmdkfuse.1 man/vmdkfuse.toml.5 man/mount.vmdkfuse.8 bdwrapper/vmware-bdwrapper.1; do \
	  install -D -m 0644 "contrib/$$page" "$(DESTDIR)$(DATADIR)/man/man$${page##*.}/$${page##*/}" || exit 1; done
	for page in mount.fuse.vmdkfuse umount.vmdkfuse umount.fuse.vmdkfuse; do \
	  ln -sf mount.vmdkfuse.8 "$(DESTDIR)$(DATADIR)/man/man8/$$page.8" || exit 1; done
	install -D -m 0644 contrib/completions/vmdkfuse.bash '$(DESTDIR)$(DATADIR)/bash-completion/completions/vmdkfuse'
	install -D -m 0644 contrib/completions/vmdkfuse.fish '$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/vmdkfuse.fish'
	install -D -m 0644 contrib/completions/_vmdkfuse '$(DESTDIR)$(ZSHDIR)/_vmdkfuse'
	install -d -m 0755 '$(DESTDIR)$(UNITDIR)'
	sed 's|@BINDIR@|$(BINDIR)|' contrib/systemd/vmdkfuse@.service.in >'$(DESTDIR)$(UNITDIR)/vmdkfuse@.service'
	chmod 0644 '$(DESTDIR)$(UNITDIR)/vmdkfuse@.service'
	install -m 0644 README.md CHANGELOG.md CONTRIBUTING.md LICENSE '$(DESTDIR)$(DATADIR)/doc/vmdkfuse'
	install -d -m 0755 '$(DESTDIR)$(DATADIR)/doc/vmdkfuse/doc'
	install -m 0644 doc/*.md '$(DESTDIR)$(DATADIR)/doc/vmdkfuse/doc'
	install -m 0644 contrib/examples/* '$(DESTDIR)$(DATADIR)/doc/vmdkfuse/examples'

deb: $(VMDKFUSE_BIN) $(BDWRAPPER_LIB) ## make a Debian package in target/package, checked by lintian
	mkdir -p '$(TARGET_DIR)/package'
	contrib/package/deb.sh '$(TARGET_DIR)/package' '$(VERSION)'

rpm: $(VMDKFUSE_BIN) $(BDWRAPPER_LIB) ## make an RPM in target/package (needs rpmbuild)
	mkdir -p '$(TARGET_DIR)/package'
	rpmbuild -bb --quiet --nodeps --define '_topdir $(TARGET_DIR)/package/rpmbuild' --define '_rpmdir $(TARGET_DIR)/package' \
	  --define 'pkg_version $(VERSION)' --define 'pkg_source $(CURDIR)' \
	  --define "pkg_libdir /usr/lib$$(case $$(uname -m) in x86_64|aarch64|s390x) echo 64;; esac)" contrib/package/vmdkfuse.spec
	rm -rf '$(TARGET_DIR)/package/rpmbuild'

deb-test: deb ## install the Debian package in a fresh Debian (root, network), use it there, purge it
	contrib/package/deb-test.sh '$(TARGET_DIR)/package' '$(VERSION)'

rpm-test: rpm ## install the RPM in a copy of this system that is thrown away (root), use it there, erase it
	contrib/package/rpm-test.sh "$$(ls -t '$(TARGET_DIR)'/package/*/vmdkfuse-'$(VERSION)'-1.*.rpm | head -n 1)"

vendor-test: ## build from vendored crates without network and without a cargo folder (several minutes)
	contrib/package/vendor-test.sh '$(TARGET_DIR)'

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
	cargo build --release --locked -p vmdkfuse -p vmware-bdwrapper -p fake-vddk
	./contrib/demo.sh
	$(MAKE) deb
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
