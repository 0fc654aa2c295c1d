//! A small pool of threads for fork-join phases.
