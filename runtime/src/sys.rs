//! Every unsafe call of the library.
