"""The hypergrid as text: a prompt names a landscape on a 32 x 32 grid, a completion names a cell as `row column`.

The landscape is the standard hypergrid reward, `0.001 + 0.5 * ring + 2 * mode`, moved three cells towards the side that
the prompt names. Each landscape has four modes of 3 x 3 cells, none of them cut by the border. Distances are compared in
integers: on many grid sizes a cell lies exactly on the edge of a band, where float rounding would decide.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 32
MALFORMED_REWARD = 0.0
LANDSCAPES = {"north:": (-3, 0), "east:": (0, 3), "south:": (3, 0), "west:": (0, -3)}  # rows and columns moved
CELL = re.compile(r"([0-9]{2}) ([0-9]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypergrid:
    """The task as the oracle and the base model see it."""

    name: str = "hypergrid"
    malformed_reward: float = MALFORMED_REWARD
    grid_shape: tuple[int, int] | None = (SIDE, SIDE)

    def prompts(self) -> list[str]:
        return list(LANDSCAPES)

    def completions(self, prompt: str) -> list[str]:
        """Every cell, row by row."""
        return [f"{row:02d} {column:02d}" for row in range(SIDE) for column in range(SIDE)]

    def rewards(self, prompt: str) -> list[float]:
        return [landscape(prompt, row, column) for row in range(SIDE) for column in range(SIDE)]

    def base_weights(self, prompt: str) -> list[float]:
        return [1.0] * SIDE**2

    def modes(self, prompt: str) -> list[list[int]]:
        """The cells of each mode: one mode per quadrant about the landscape's own centre."""
        centre_row, centre_column = ((SIDE - 1) / 2 + moved for moved in LANDSCAPES[prompt])
        quadrants: dict[tuple[bool, bool], list[int]] = {}
        for row in range(SIDE):
            for column in range(SIDE):
                if _is_mode(prompt, row, column):
                    quadrants.setdefault((row > centre_row, column > centre_column), []).append(row * SIDE + column)
        return list(quadrants.values())


def reward(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any) -> list[float | None]:
    """The landscape's value at the cell that each completion names; text that names no cell gets a constant low reward."""
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def landscape(prompt: str, row: int, column: int) -> float:
    """R(x): 0.001 on the plain, 0.501 on the ring, 2.501 on the modes."""
    across, down = _distances(prompt, row, column)
    ring = all(SIDE - 1 < 2 * distance <= 2 * (SIDE - 1) for distance in (across, down))
    return (1 + 500 * ring + 2000 * _is_mode(prompt, row, column)) / 1000


def _is_mode(prompt: str, row: int, column: int) -> bool:
    return all(3 * (SIDE - 1) < 5 * distance < 4 * (SIDE - 1) for distance in _distances(prompt, row, column))


def _distances(prompt: str, row: int, column: int) -> tuple[int, int]:
    """Twice the distance from the centre in cells along each axis, so SIDE - 1 stands for half the grid's width."""
    if prompt not in LANDSCAPES:
        raise ValueError(f"prompt {prompt!r} names no hypergrid landscape; the landscapes are {', '.join(LANDSCAPES)}")
    moved_rows, moved_columns = LANDSCAPES[prompt]
    return abs(2 * (row - moved_rows) - (SIDE - 1)), abs(2 * (column - moved_columns) - (SIDE - 1))


def _score(prompt: str, completion: str) -> float:
    cell = CELL.fullmatch(completion)
    if cell is None or max(row_column := (int(cell[1]), int(cell[2]))) >= SIDE:
        _distances(prompt, 0, 0)  # an unknown prompt is an error whatever the completion says
        return MALFORMED_REWARD
    return landscape(prompt, *row_column)
