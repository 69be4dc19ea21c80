# What a newcomer calls. `make help` lists it.

CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help setup build test fuzz demo capture bench-replay bench-stages bench-instructions bench-reconcile bench-live bench-viewer faults power-cuts wire fmt lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing (QEMU, mmdebstrap, ...); does nothing if all is there
	./scripts/setup

build: ## the replay-migrate command, optimised: target/release/replay-migrate
	$(CARGO) build --release --locked --bin replay-migrate

# The programs come first: tests through the command line run them.
test: setup ## all tests, the ones with real guests too
	$(CARGO) build --workspace --bins --locked
	$(CARGO) test --workspace --locked --no-fail-fast

# Each parser of what others write; seconds for each target. It needs a C++ compiler, for libFuzzer.
fuzz: ## every fuzz target, ten minutes each, and a table of what came of it: SECONDS=600
	./scripts/setup --fuzz
	./fuzz/run --all $(or $(SECONDS),600)

# With a guest that chance is taken out of; ORDINARY=1 takes one as Debian makes it.
demo: setup build ## a desktop roams between two sites; writes target/demo/report.json
	$(CARGO) run --release --locked --package testkit --bin demo -- $(if $(ORDINARY),,--replay-friendly)

# SESSION is the name of one of the testkit's sessions, or a file; OUT the folder to make.
capture: setup build ## a session recorded anew, its states kept: SESSION=demo OUT=target/capture
	$(CARGO) run --release --locked --package testkit --bin session -- --replay-friendly \
		--session $(or $(SESSION),demo) --out $(or $(OUT),target/capture)

# Hours for all of it; what is measured already is kept, so that it can be interrupted. ABLATION takes
# options: ABLATION="--workloads files,writing --guests friendly --networks off --moves 0" (without the demo).
# ABLATION="--users ordinary --guests friendly --networks on" has a user who types and thinks at leisure.
# ABLATION="--guests counted --networks on" has guests whose instructions are counted (`vm create --icount`).
bench-replay: setup build ## how far replays diverge: the suite, quick or not, friendly or not, with a network or not
	$(CARGO) build --release --locked --package testkit --bin demo
	$(CARGO) run --release --locked --package testkit --bin ablation -- $(ABLATION)

bench-stages: ## the reconciler's stages on synthetic guests: hashing, resolving, encoding, applying
	$(CARGO) bench --locked --package reconciler

# The same in each run, whatever else the machine does; what was counted last is compared with. The version of the
# program that runs Valgrind has to be its library's.
bench-instructions: ## instructions of each of the reconciler's stages, by Callgrind
	./scripts/setup --valgrind
	$(CARGO) install --quiet --locked --root target/tools gungraun-runner \
		--version $$(sed -n 's/^gungraun = "=\(.*\)"$$/\1/p' benches/instructions/Cargo.toml)
	CARGO_TARGET_DIR=$(CURDIR)/target/instructions GUNGRAUN_RUNNER=$(CURDIR)/target/tools/bin/gungraun-runner \
		$(CARGO) bench --locked --manifest-path benches/instructions/Cargo.toml

# CAPTURES are folders that `make capture` has made; rows of others that were measured before stay. Peers that are
# not installed are named (`scripts/setup --peers` installs them). PEERS takes options: PEERS="--only twin,rsync".
bench-reconcile: setup build ## ours beside QEMU, rsync, zstd, xdelta3 and xz, on captures: CAPTURES="dir dir"
	$(CARGO) run --release --locked --package testkit --bin peers -- $(PEERS) \
		$(or $(CAPTURES),$(CAPTURE),target/capture)

# An hour or so for all of it, most of it QEMU's own ways; rows that were measured before stay. LIVE takes
# options: LIVE="--workloads counters --only live,qemu-xbzrle --trips 0".
bench-live: setup build ## moving a VM that runs on, ours beside QEMU's own migration on the same guest and line
	$(CARGO) run --release --locked --package testkit --bin live -- $(LIVE)

bench-viewer: ## what the recording proxy adds to an event, beside a direct connection
	$(CARGO) test --release --locked --package recorder --test proxy an_event_takes -- --nocapture

# After a change of a message, with PROTOCOL_VERSION raised before. PROGRAM is another replay-migrate: an older version's.
wire: setup ## what two sites say to each other, recorded as test vectors: site/tests/wire/vN
	$(CARGO) build --locked --workspace --bins
	./target/debug/wire --program $(or $(PROGRAM),target/debug/replay-migrate)
	$(CARGO) test --locked --package site --lib record_what_is_seldom_said -- --ignored

# Most of an hour; what has been run and held is kept, so that it can be interrupted. Needs to mount, as root or in a
# user namespace. FAULTS takes options: FAULTS="--only commit,fsync-error", FAULTS=--list.
faults: setup build ## migrations struck by faults in each phase at each side; writes target/faults.json
	$(CARGO) run --release --locked --package testkit --bin faults -- $(FAULTS)

# A second or so each; needs root, to mount images. `make test` does fifty of them. CUTS takes options:
# CUTS="--cuts 1000 --seed 7 --keep target/cuts".
power-cuts: setup build ## power cuts at any moment of two sites' life with a VM: what they find, and go on with
	$(CARGO) run --release --locked --package testkit --bin power -- $(CUTS)

fmt: ## format the sources
	$(CARGO) fmt --all

lint: ## what CI refuses: unformatted sources, warnings
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

clean: ## remove what was built; the cached guest stays
	$(CARGO) clean
