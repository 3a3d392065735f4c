"""Triton kernels: device helpers, kernel, launcher. No registry, no torch.library, no names of formats."""
