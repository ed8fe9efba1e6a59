"""How the error of a hidden layer falls with its number of neurons, on the heads of pretrained models.

The relative error |x^ - x| / |x|, against softmax attention, of

    matrix      the attention matrices of a layer (Frobenius norm over its heads and tokens)
    output      the attention output of a layer (the same norm)
    normaliser  p_t = sum_j exp(q_t.k_j), what the astrocyte divides by: |p^_t / p_t - 1|, median over heads and tokens
    block       what the transformer block gives, feed-forward and residuals included

for m = 2^4 to 2^17 hidden neurons, on all layers of MiniLM (128 tokens) and of ViT-tiny (197 tokens; the digits ViT
where ASTROATTN_DATA is not set). The hidden layers:

    independent, orthogonal   the paper's random weights, the same for all heads and layers in one seed
    calibrated                static weights drawn near q + k of attended pairs of sample data, with importance weights
    learned                   static weights trained on the sample data to attend as softmax does
    Hebbian                   learned from the keys that are being read, without near field and exact keys
    uniform                   the control: every key alike
    SVD                       the floor of the matrix error: no attention of rank m can be below

Errors are geometric means over seeds, with 95 % t-intervals in the logarithm; what no seed changes has no interval.
"All layers" is their arithmetic mean in each seed. Sample data and reported data share no item. The theory, for
independent weights, is in `theory.py`.
"""
