"""Implementations of the ops. To add one: a file here and its name in `base.BACKENDS`."""

from .base import BACKENDS, Impl, Operand, Problem, Rows, Weight, register, resolve, select, use_backend

__all__ = ["BACKENDS", "Impl", "Operand", "Problem", "Rows", "Weight", "register", "resolve", "select", "use_backend"]
