//! The one supervisor of child processes.
