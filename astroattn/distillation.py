"""Training the hidden layers of a patched model to attend as its softmax attention did."""
