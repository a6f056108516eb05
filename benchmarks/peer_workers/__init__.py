"""One module for each framework, run as a process of its own by `benchmarks.peers`."""
