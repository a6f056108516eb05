"""Devices, processes and seeds: one mesh, `jax.distributed`, and many networks in one program."""
