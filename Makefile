# One line a target; what a target does is in scripts/.
AGENT ?= target/release/machinen-agent

.PHONY: setup kernel guest-image run test bench lint

setup:
	scripts/setup

kernel: setup
	scripts/kernel

guest-image:
	scripts/guest-image $(AGENT)

run: build
	target/release/machinen-demo

test: build
	cargo test --workspace

bench: build
	target/release/machinen-bench

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
