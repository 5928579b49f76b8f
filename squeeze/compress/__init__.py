"""Compression stages: each takes a Model, changes its weights in place and tells what it did to every layer.

A new family is one file here and one name in `Stage`; recipes, `squeeze methods` and the tests read the tables in them.
"""

from squeeze.compress.quantize import METHODS, SCHEMES, QuantizeStage

Stage = QuantizeStage
"""What a recipe's `stages` may hold: a union discriminated by `kind` (one family so far)."""

__all__ = ["METHODS", "SCHEMES", "QuantizeStage", "Stage"]
