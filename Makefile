# phos-runc. `make demo` and `make test` are all a newcomer needs; both install what the machine lacks (root, apt).

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
PROFILE ?= release
DESTDIR ?=
CARGO ?= cargo

.PHONY: fuzz licences deny all demo test test-embedded toolchain setup build debug release install uninstall kernels plot gpu-bundle

all: release

toolchain:
	@command -v $(CARGO) >/dev/null || { echo "no $(CARGO) in PATH: install Rust 1.89 or newer (rustup), or name it: make CARGO=..." >&2; exit 1; }

setup:
	integration/scripts/setup.sh

# What is built is looked for here, wherever the environment has cargo put it.
build release test: export CARGO_TARGET_DIR = $(CURDIR)/target

build: toolchain setup
	$(CARGO) build --workspace

# A container with a GPU (or the simulated driver), checkpointed running, stopped, restored, and proven.
demo: build
	integration/scripts/sandbox.sh target/debug/demo

# Everything that runs without a GPU.
test: build
	integration/scripts/setup.sh engines
	$(CARGO) test --workspace

debug: build

# The embedded lower runtime beside runc. A folder of its own, so that the features of one build do not undo another's.
test-embedded: build
	$(CARGO) build -p phos-runc --features libcontainer --target-dir target/embedded
	PHOS_EMBEDDED=$(CURDIR)/target/embedded/debug/phos-runc $(CARGO) test -p phos-integration --test conformance embedded

release: toolchain
	$(CARGO) build --release -p phos-runc -p phos-shim -p phos-hooks

# PROFILE=debug installs what `make build` has made. An existing file of the host's own is never written over: examples for the
# engines go to share/, and where an engine reads a folder of further files, one goes there unless there is one already.
install: $(PROFILE)
	install -D -m 755 target/$(PROFILE)/phos-runc $(DESTDIR)$(PREFIX)/bin/phos-runc
	install -D -m 755 target/$(PROFILE)/libphos.so $(DESTDIR)$(PREFIX)/lib/phos/libphos.so
	install -D -m 755 target/$(PROFILE)/phos-hook $(DESTDIR)$(PREFIX)/lib/phos/phos-hook
	install -D -m 644 contrib/man/phos-runc.8 $(DESTDIR)$(PREFIX)/share/man/man8/phos-runc.8
	install -D -m 644 contrib/completions/phos-runc.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/phos-runc
	DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" contrib/configuration.sh install

# Leaves configuration that was changed since.
uninstall:
	DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" contrib/configuration.sh uninstall
	rm -f $(DESTDIR)$(PREFIX)/bin/phos-runc $(DESTDIR)$(PREFIX)/lib/phos/libphos.so $(DESTDIR)$(PREFIX)/lib/phos/phos-hook \
	  $(DESTDIR)$(PREFIX)/share/man/man8/phos-runc.8 $(DESTDIR)$(PREFIX)/share/bash-completion/completions/phos-runc
	-rmdir --ignore-fail-on-non-empty $(DESTDIR)$(PREFIX)/lib/phos

# Recompiles the GPU kernels; the results are committed, so this is needed only after changing them.
kernels:
	gpu-engine/kernels/build.py gpu-engine/kernels/chunks.cu integration/sample/kernels/sample.cu

# The picture of the measured pauses (later files count more), and the tables of all figures.
plot:
	cd integration/results && ../gpu/plot.py matrix-6290026.jsonl matrix-89eda2b.jsonl matrix-dc7d3c2.jsonl models-c00d8f9.jsonl \
	  models-89eda2b.jsonl torch-62a21cd.jsonl models-dc7d3c2.jsonl torch-dc7d3c2.jsonl matrix-5fb9fb4.jsonl jax-5fb9fb4.jsonl \
	  torch-5fb9fb4.jsonl llama-5fb9fb4.jsonl train-5fb9fb4.jsonl torch-e3fa10f.jsonl train-e3fa10f.jsonl \
	  jax-02420c6.jsonl torch-02420c6.jsonl torch-eb2eaad.jsonl train-eb2eaad.jsonl jax-4f63501.jsonl models-4f63501.jsonl \
	  torch-4f63501.jsonl torch-0a0d038.jsonl torch-60a1833.jsonl torch-ce6f7cd.jsonl >../../contrib/docs/pause.svg
	integration/gpu/figures.py integration/results/*.jsonl >contrib/docs/figures.md

# A folder that runs the GPU tests and benchmarks on a machine without packages.
gpu-bundle:
	integration/scripts/gpu-bundle.sh

# Fuzzes everything that is read from outside, SECONDS each (`cargo install cargo-fuzz`, `rustup toolchain install nightly`).
SECONDS ?= 600
fuzz:
	cd integration/fuzz/libfuzzer && $(CARGO) +nightly fuzz build --fuzz-dir .
	integration/fuzz/run.py $(SECONDS)

# The list of all crates that are built in, by licence.
licences:
	integration/scripts/licences.py --write

# The same for every feature, by cargo-deny (installed into .tools, which takes some minutes); advisories where their database
# can be reached.
DENY = .tools/cargo-deny/bin/cargo-deny --workspace --config integration/deny.toml
deny: .tools/cargo-deny/bin/cargo-deny
	$(DENY) check bans licenses sources
	if $(DENY) fetch db; then $(DENY) check advisories; else echo 'advisories: not checked, their database cannot be reached'; fi

.tools/cargo-deny/bin/cargo-deny:
	nice $(CARGO) install --locked --version 0.20.2 --root .tools/cargo-deny cargo-deny
