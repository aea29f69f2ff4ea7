//! The same agent in a VM.
