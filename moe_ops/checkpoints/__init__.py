"""Checkpoints of any producer -> canonical quantized tensors. `load.load_quantized` is the way in."""
