"""The operations that are ours: the CPU convolution, and the settings of the C library."""
