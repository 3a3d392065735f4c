"""What a state_dict of a rank says of itself, so that it is not loaded as another rank's, or one of other ranks.

torch's `fully_shard` keeps parameters of which it knows the whole: those are saved and loaded across numbers of ranks
by torch.distributed.checkpoint. `kept_whole` are those that it does not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_KEY = "part"
_INTEGERS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Frozen parameters that torch's FSDP2 does not shard: scales that are one number for a whole Linear.

        fully_shard(layer, mesh=mesh, ignored_params=moe_ops.sharding.kept_whole(model))

    Before torch 2.13 also codes that are integers (it wants a gradient of them): every rank keeps all of those, 8-bit
    floats are sharded. They have no gradient; move them to the device with the model before it is sharded.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {p for p in frozen if not p.ndim or not (_INTEGERS or p.is_floating_point())}


class OfRank(nn.Module):
    """Mixin of a module that holds a rank's part: `said` tells which."""

    def said(self) -> str:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[_KEY] = self.said()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        given = metadata.get(_KEY)
        if given is not None and given != self.said():
            errors.append(f"{prefix[:-1] or 'the module'} is {self.said()} here, and {given} in what is loaded")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
