"""Options that several commands share, each defined once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Base = Annotated[
    Path,
    typer.Option("--base", help="Folder of the base, or org/name[@revision] on the hub.", metavar="MODEL"),
]
Adapter = Annotated[Path, typer.Option("--adapter", help="Folder of the LoRA adapter.", metavar="DIR")]
Merged = Annotated[Path, typer.Option("--merged", help="Folder of the merged model.", metavar="DIR")]
TestSet = Annotated[
    Path, typer.Option("--test-set", help="JSONL with prompt, response and metadata.", metavar="FILE")
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the record as JSON instead of tables.", rich_help_panel="Display"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: spread a model too large for one GPU over all, memory and disk.")
]
Template = Annotated[
    str, typer.Option(help="How prompts are laid out: auto (the tokenizer's chat template), chat, plain.")
]
PublicKey = Annotated[
    Path | None, typer.Option(help="Public key (PEM) whose signature is required.", metavar="KEY")
]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens of a batch at most.")]


def _rows(text: str) -> int | None:
    return None if text == "auto" else int(text)


BatchSize = Annotated[
    int | None,
    typer.Option(
        parser=_rows,
        metavar="<int>|auto",
        help="Rows of a batch at most. [auto: what its tokens allow, halved where memory is short]",
    ),
]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens. [the model's context]")]
Arithmetic = Annotated[
    str, typer.Option(help="auto (float32 by the faster route), mkl, onednn, or bfloat16 (not exact).")
]
Limit = Annotated[int | None, typer.Option(help="Take only so many rows; the result is marked as partial.")]
ShuffleSeed = Annotated[int | None, typer.Option(help="With --limit: choose the rows at random.")]
LossOn = Annotated[str, typer.Option(help="response, or all for full-text loss.")]
EndOfTurn = Annotated[
    bool, typer.Option("--end-of-turn/--no-end-of-turn", help="Score the token that ends a response.")
]
States = Annotated[
    Path | None,
    typer.Option("--states", help="Folder that keeps a model's states for `compare`.", metavar="DIR"),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at rows that would be cut.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ExecutorName = Annotated[
    str, typer.Option("--executor", help="Where the work is done: local, or ray (a cluster).")
]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", help="Of the cluster: auto, ray://host:10001. [one is started here]"),
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", help="With ray: how many. [as many as the cluster has room for]")
]
WorkerThreads = Annotated[
    int | None, typer.Option("--worker-threads", help="With ray: of each worker. [those of this process]")
]
WorkerGpus = Annotated[
    float | None, typer.Option("--worker-gpus", help="With ray: of each worker. [1 where a GPU computes]")
]
GateFormat = Annotated[
    str, typer.Option("--format", help="How gates are printed: text, junit, json, markdown or github.")
]


def taken_by(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's arguments (its `locals()`) that a public function takes by the same name."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


# The options of a cluster, as one: a command that can use one takes an `executor` and says so.


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
        from lorasmith.executors.choose import make_executor
        from lorasmith.options import ClusterOptions

        executor = make_executor(ClusterOptions.make({option: values.pop(option) for option in _OPTIONS}))
        return command(**values, executor=executor)

    shown = inspect.Signature(parameters, return_annotation=None)
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    vars(called)["__signature__"] = shown
    return called
