"""The astrocyte's calcium against the softmax normaliser: `python -m eval.calcium_traces`."""
