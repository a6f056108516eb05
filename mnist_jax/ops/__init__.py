"""Operations of our own: the CPU convolution and dense product, and the settings of malloc."""
