"""The options of a cluster, as one: a command that can use one takes an `executor` and says so."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

from lorasmith.cli.options import ExecutorName, RayAddress, WorkerCount, WorkerGpus, WorkerThreads

R = TypeVar("R")

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "executor": (ExecutorName, "local"),
    "ray_address": (RayAddress, None),
    "workers": (WorkerCount, None),
    "worker_threads": (WorkerThreads, None),
    "worker_gpus": (WorkerGpus, None),
}
"""Name → type and default."""


def with_executor(command: Callable[..., R]) -> Callable[..., R]:
    """The command with these options in place of its parameter `executor`, which is made from them.

    Raises as `make_executor` does.
    """
    hints = get_type_hints(command, localns={"Executor": Any}, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "executor":
            parameters += [
                inspect.Parameter(option, parameter.kind, default=default, annotation=kind)
                for option, (kind, default) in _OPTIONS.items()
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(command)
    def called(**values: Any) -> R:
        from lorasmith.executors.base import make_executor
        from lorasmith.options import ClusterOptions

        executor = make_executor(ClusterOptions.make({option: values.pop(option) for option in _OPTIONS}))
        return command(**values, executor=executor)

    shown = inspect.Signature(parameters, return_annotation=None)
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    vars(called)["__signature__"] = shown
    return called
