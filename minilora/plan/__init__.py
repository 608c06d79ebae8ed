"""How much memory training takes, told from the engine's own code before a single weight is there: `plan`.

plan.py puts the columns together; memory.py runs one step on shapes (shapes.py; adapters.py for adapters), with what
each primitive makes and keeps (rules.py); named.py and machines.py hold the shapes of published models and the memory
of common machines.
"""

from .memory import Memory, Step
from .plan import Column, Plan, fitting, plan

__all__ = ["Column", "Memory", "Plan", "Step", "fitting", "plan"]
