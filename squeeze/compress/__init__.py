"""Compression stages: each takes a Model, changes its weights in place and tells what it did to every layer.

A new family is one file here and one name in `Stage`; recipes, `squeeze methods` and the tests read the tables in them.
"""

from typing import Annotated

from pydantic import Field

from squeeze.compress.qat import QatStage
from squeeze.compress.quantize import QuantizeStage
from squeeze.compress.schemes import METHODS, SCHEMES
from squeeze.distillation import DistillStage
from squeeze.pruning.settings import PruneStage

Stage = Annotated[QuantizeStage | QatStage | DistillStage | PruneStage, Field(discriminator="kind")]
"""What a recipe's `stages` may hold: a union discriminated by `kind`."""

__all__ = ["METHODS", "SCHEMES", "DistillStage", "PruneStage", "QatStage", "QuantizeStage", "Stage"]
