"""Operations of our own: the convolution, pooling, dense product, settings of malloc."""
