"""Why a plan won, why the others lost, and what to change where nothing fits."""

from __future__ import annotations

from planner.candidates import Constraints
from planner.chain import Costs
from planner.errors import DoesNotFitError


def runners_up(costs, constraints, outcome):
    return ()


def why(costs, outcome):
    return ()


def does_not_fit(costs: Costs, constraints: Constraints) -> DoesNotFitError:
    return DoesNotFitError("nothing fits")
