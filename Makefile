# One line a target; what a target does is in scripts/.
AGENT ?= target/release/machinen-agent

.PHONY: setup kernel guest-image

setup:
	scripts/setup

kernel: setup
	scripts/kernel

guest-image:
	scripts/guest-image $(AGENT)
