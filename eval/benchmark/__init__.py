"""Time and memory of attention against SDPA: `python -m eval.benchmark`."""
