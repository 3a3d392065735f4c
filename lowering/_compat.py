"""The only file that touches names of torch's compiler that have moved, or may."""

import torch.compiler.config


def get_cache_key_tag() -> str:
    return torch.compiler.config.cache_key_tag


def set_cache_key_tag(tag: str) -> None:
    torch.compiler.config.cache_key_tag = tag
