"""Ahead-of-time compiling for accelerators that are not there, and what the compiler says."""
