"""Finds experts in any model, by structure: what a module holds, where, and how it is called. No model names.

`read` goes through LAYOUTS (one entry per way to hold experts); `read_routing` reads the block around experts that have
no call of their own. What the flags of the experts interface do not say is found, or checked, by evaluating the
module's own code on a few random rows (`evaluate`, `standins`).
"""

from .layouts import LAYOUTS, read
from .routes import Routing, read_routing
from .spec import FLAGS, POST_NORM, CannotAdapt, ExpertsSpec

__all__ = ["FLAGS", "LAYOUTS", "POST_NORM", "CannotAdapt", "ExpertsSpec", "Routing", "read", "read_routing"]
