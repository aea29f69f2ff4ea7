# One or a few lines a target; what a target does is in scripts/.
PREFIX ?= /usr/local

.PHONY: setup kernel guest-image build run test test-kvm test-programs bench lint install install-files deb test-deb installer-image soak

setup:
	scripts/setup

kernel: setup
	scripts/kernel

guest-image: setup
	scripts/guest-image "$$(scripts/build-agent)"

build: kernel guest-image
	cargo build --locked --release --package containerd-shim-machinen-v1 --package machinen-cli

run: build
	cargo build --locked --package machinen-integration
	target/debug/machinen-demo

# TESTS: --short leaves out the tests of config/long-tests.
test: build
	scripts/test $(TESTS)

# KVM_TESTS: parts of tests' names, in place of the list in config/kvm-tests. KVM_SUITE: the host's Debian.
# KVM_OPTIONS: further options of scripts/kvm-host.
KVM_SUITE ?= trixie

test-kvm: build
	scripts/kvm-host $(KVM_OPTIONS) --suite $(KVM_SUITE) test $(KVM_TESTS)

# PROGRAMS: names of programs, or --short for those that the continuous integration runs.
test-programs: build
	cargo test --locked --workspace --no-run
	target/debug/machinen-programs $(PROGRAMS)

bench: build
	cargo build --locked --release --package machinen-integration
	target/release/machinen-bench

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

install: build install-files

# What is built already.
install-files:
	install -D -t $(DESTDIR)$(PREFIX)/bin target/release/containerd-shim-machinen-v1 target/release/machinen
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/machinen target/guest/vmlinux target/guest/guest.img
	scripts/install-help target/release/machinen $(DESTDIR)$(PREFIX)/share

# A package for Debian, in target/deb.
deb: build
	scripts/deb

# Installs, upgrades, removes and purges that package on a Debian of its own.
test-deb: deb
	scripts/test-deb

# The image of the DaemonSet in deploy/installer, in target/installer.
installer-image: build
	scripts/installer-image

# PODS: how many pods of Kubernetes are created and removed, one after the other, while what they leave is watched.
PODS ?= 200

soak: build
	MACHINEN_SOAK_PODS=$(PODS) scripts/test --soak
