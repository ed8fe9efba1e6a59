"""Functions on tensors; they import nothing of the rest of the library."""
