"""The types of keys, and what every section has: frozen, no unknown keys, no conversions between types."""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from latticeflow.config.words import LARGEST_INTEGER
from latticeflow.exact.arguments import LARGEST_BETA


def odd(value: int) -> int:
    """Refuse even integers."""
    if value % 2 == 0:
        raise ValueError(f"{value} is even")
    return value


def normalised(pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Refuse pairs whose first members do not add up to 1."""
    if pairs and not math.isclose(sum(weight for weight, _ in pairs), 1.0, abs_tol=1e-9):
        raise ValueError(f"the weights of {pairs} do not add up to 1")
    return pairs


Natural = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Count = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
Several = Annotated[int, Field(ge=2, le=LARGEST_INTEGER)]
Extent = Annotated[int, Field(ge=1, le=2**16)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, le=LARGEST_BETA)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), Strict(False)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1), Strict(False)]
SmoothSector = Annotated[
    tuple[Annotated[tuple[NonNegative, NonNegative], Strict(False)], ...], Strict(False), AfterValidator(normalised)
]
Grid = Annotated[tuple[Count, Count], Strict(False)]


class Settings(BaseModel):
    """One section: frozen, no unknown keys, no conversions between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
