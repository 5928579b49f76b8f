"""Pruning: weights, neurons, heads and layers that a network can do without.

Score, pattern and scope are three choices: a criterion (`criteria.py`) says how much a weight matters and never builds a mask; a pattern
(`patterns.py`) says which zeros may stand together; an allocation (`allocation.py`) says how many each matrix gets. Structures
(`structures.py`) are not zeroed but removed: what comes out is an ordinary, smaller Transformers model.
"""
