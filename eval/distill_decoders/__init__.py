"""Learned linear attention beside a near field in pretrained decoders: what it loses before and after training."""
