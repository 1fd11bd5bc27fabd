"""Pixels in any container, turned into tensors that fit the weights."""
