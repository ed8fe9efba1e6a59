"""Other people's fast attention, re-implemented plainly from their papers, to be measured beside ours.

Each module has `attention(query, key, value, **budget)`, bidirectional and without padding, on [B, H, N, D] with the
queries already scaled (softmax(q k') v is the truth), and `products(tokens, width, **budget)`, the products of length
D per query of one head, counted as `AstrocyteAttention.cost` counts them: selection, means and clustering included,
sorting and top-k not. Where the number of exact keys depends on the inputs, `kept_keys` measures it. A budget is made
of whole numbers.
"""
