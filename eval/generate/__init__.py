"""A pretrained decoder with a cache of fixed size: what is lost, beside other ways to keep a cache small."""
