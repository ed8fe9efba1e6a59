"""Controls on the agreement of calcium and softmax normaliser: `python -m eval.controls`."""
