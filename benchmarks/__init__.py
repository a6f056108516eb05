"""Benchmarks of this package, and of the same work in other frameworks."""
