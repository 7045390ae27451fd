"""A model of its own for a worker elsewhere: made from what can be sent, not from what is in memory here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.models.arithmetic import choose_route
from lorasmith.models.loglik import open_forward
from lorasmith.models.session import ScoringOptions, prepare
from lorasmith.models.states import Scored, scoring_work
from lorasmith.models.work import RowWork

OPEN_REPLICA = "lorasmith.models.replica:open_replica"
"""Where a worker finds the function below."""


@contextmanager
def open_replica(
    model: str, adapter: str | None, test_set: str, options: ScoringOptions, route: str, keep: bool
) -> Iterator[RowWork[Scored]]:
    """The work of scoring, as the caller's own process would do it: same options, same route, same batches.

    The paths have to lead to the same files on the worker's machine; `route` is the name of the arithmetic
    that the caller chose, so that no worker probes for another. Raises as validation does.
    """
    place, _ = options.place()
    chosen = choose_route(route, place)
    on_top = None if adapter is None else Path(adapter)
    loaded = options.load(Path(model), adapter=on_top, dtype=chosen.dtype)
    work = prepare(Path(test_set), loaded, options, chosen)
    with open_forward(loaded, work.rows, chosen) as forward:
        yield scoring_work(forward, work, keep=keep)
