"""The one-to-one pairing with the largest sum: Kuhn 1955, by the shortest paths of Jonker and Volgenant."""

from __future__ import annotations

from collections.abc import Sequence

_FAR = float("inf")


def best_pairs(values: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column) with the largest sum of values; min(rows, columns) of them, sorted by row."""
    rows, columns = len(values), len(values[0]) if values else 0
    if rows > columns:
        turned = [[values[row][column] for row in range(rows)] for column in range(columns)]
        return sorted((row, column) for column, row in best_pairs(turned))
    row_price, column_price = [0.0] * rows, [0.0] * columns
    owner: list[int | None] = [None] * columns
    for start in range(rows):
        _assign(values, start, row_price, column_price, owner)
    return sorted((row, column) for column, row in enumerate(owner) if row is not None)


def _assign(
    values: Sequence[Sequence[float]],
    start: int,
    row_price: list[float],
    column_price: list[float],
    owner: list[int | None],
) -> None:
    """Give row `start` a column along the cheapest alternating path; prices stay feasible."""
    columns = len(owner)
    distance, before = [_FAR] * columns, [-1] * columns
    reached: list[int] = []
    row, length, via = start, 0.0, -1
    while True:
        for column in range(columns):
            if column not in reached:
                cost = length - values[row][column] - row_price[row] - column_price[column]
                if cost < distance[column]:
                    distance[column], before[column] = cost, via
        via = min((c for c in range(columns) if c not in reached), key=lambda c: distance[c])
        length = distance[via]
        reached.append(via)
        holder = owner[via]
        if holder is None:
            break
        row = holder
    row_price[start] += length
    for column in reached[:-1]:
        holder = owner[column]
        if holder is not None:
            row_price[holder] += length - distance[column]
        column_price[column] -= length - distance[column]
    while via >= 0:
        previous = before[via]
        owner[via] = start if previous < 0 else owner[previous]
        via = previous
