//! Test harness: a private containerd, images made on the spot, and what is left behind.
