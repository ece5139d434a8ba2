"""The kernel for few queries over many keys, and its launch."""
