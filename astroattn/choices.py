"""What some arguments may be, where the command line lists it before PyTorch is imported."""

DTYPES = ("float32", "float16", "bfloat16", "float64")  # of the weights of a model
POOLINGS = ("auto", "mean", "cls", "model")  # how hidden states become an embedding
PYTHON_DOCS = "python-docs"  # a source of texts that is on every machine
TOLERANCES = ("top1", "kl", "cosine", "neighbour", "word_error", "hidden_error")  # what one can be of in a comparison
FIGURES = (".png", ".pdf", ".svg")  # what a figure can be written as
