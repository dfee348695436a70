"""What layers of Mamba are made of: a causal convolution of each channel, and a selective scan."""
