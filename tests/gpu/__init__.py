"""Checks on a machine with a GPU: `prepare` makes bundles where the compiler is, `run` checks them where the GPU is."""
