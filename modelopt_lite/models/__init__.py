"""What makes a model sparse: which modules, what a call of theirs means, and the one way into the kernels."""
