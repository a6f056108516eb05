"""Measures `mnist_jax`, alone and beside its peers. The package itself never imports this.

Importing it imports nothing: `benchmarks.timing` also runs where there is no JAX.
"""
