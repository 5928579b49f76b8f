"""Distillation: a smaller student that learns a trained teacher's answers.

`settings.py` is what a recipe says, `students.py` makes the network, `answers.py` reads what a network computes on the way
(`attention.py`: from its attention), `losses.py` compares two of those (`distributions.py`: over classes, in little memory),
`objective.py` puts them together for the training engine, `stage.py` is the stage of a recipe.
"""

from squeeze.distillation.stage import DistillStage

__all__ = ["DistillStage"]
