"""Error of whole models against cost and time of their attention, ours and others': `python -m eval.frontier`."""
