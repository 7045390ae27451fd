"""`lorasmith run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import (
    AsJson,
    BatchSize,
    BatchTokens,
    DeviceMap,
    GateFormat,
    MaxLength,
    RayAddress,
    WorkerCount,
    WorkerGpus,
    WorkerThreads,
)


# Every option is None unless it was typed, so that only typed ones win over the config file.
def run(
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the base, or org/name[@revision] on the hub.", metavar="MODEL"),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of the LoRA adapter.", metavar="DIR")] = None,
    test_set: Annotated[
        Path | None, typer.Option(help="JSONL with prompt, response and metadata.", metavar="FILE")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder.", metavar="RUN")] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            help="What the adapter was trained on: checked for overlap with the test set.", metavar="FILE"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these options; flags win.", metavar="FILE")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config as TOML and stop.")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="base, float32, bfloat16 or float16. [base]")] = None,
    rounding: Annotated[
        str | None, typer.Option(help="auto, nearest, dithered or calibrated. [auto]")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Of the training rows, for a calibrated merge. [32768]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. [42]")] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat or plain. [auto]")] = None,
    loss_on: Annotated[
        str | None, typer.Option(help="response, or all for full-text loss. [response]")
    ] = None,
    end_of_turn: Annotated[
        bool | None,
        typer.Option("--end-of-turn/--no-end-of-turn", help="Score the token that ends a response. [on]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps. [auto]")] = None,
    device_map: DeviceMap = None,
    arithmetic: Annotated[str | None, typer.Option(help="auto, mkl or onednn. [auto]")] = None,
    batch_tokens: BatchTokens = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Stop at rows that would be cut. [on]")
    ] = None,
    tasks: Annotated[
        bool | None,
        typer.Option("--tasks/--no-tasks", help="Also score answers to the benchmarks' questions. [off]"),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(help="Adapter and merged model also write so many tokens, to be compared.")
    ] = None,
    followup: Annotated[
        str | None,
        typer.Option(
            help="After the release: some of respond,draft,speculate,compress (options: the config).",
            metavar="STEPS",
        ),
    ] = None,
    compression: Annotated[str | None, typer.Option(help="gzip, zstd or none. [gzip]")] = None,
    model_name: Annotated[str | None, typer.Option(help="Of the merged model, for its card.")] = None,
    base_model_id: Annotated[
        str | None,
        typer.Option(help="org/name of the base, for the card. [as the adapter names it]", metavar="ID"),
    ] = None,
    check_memory: Annotated[
        bool | None,
        typer.Option("--check-memory/--no-check-memory", help="Refuse to start with too little memory. [on]"),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine in dollars, for gates on cost.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Dollars at most, with --price-per-hour; stops, resumable, at it.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option("--executor", help="Where models run and shards are merged: local or ray. [local]"),
    ] = None,
    ray_address: RayAddress = None,
    workers: WorkerCount = None,
    worker_threads: WorkerThreads = None,
    worker_gpus: WorkerGpus = None,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash every input again.")] = False,
    output_format: GateFormat = "text",
    as_json: AsJson = False,
) -> None:
    """Validate, merge, prove, compare, judge and package, in one resumable run folder.

    A killed run continues when the same command is given again and ends with the same bytes. Exit code 1
    means that it ran and a gate did not pass.

    Example: `lorasmith run --base models/base --adapter models/adapter --test-set test.jsonl --output run`
    """
    flags = {
        "base": base,
        "adapter": adapter,
        "test_set": test_set,
        "output": output,
        "train": tuple(train) if train else None,
        "precision": precision,
        "rounding": rounding,
        "calibration_tokens": calibration_tokens,
        "seed": seed,
        "template": template,
        "loss_on": loss_on,
        "end_of_turn": end_of_turn,
        "device": device,
        "device_map": device_map,
        "arithmetic": arithmetic,
        "batch_tokens": batch_tokens,
        "batch_size": batch_size,
        "max_length": max_length,
        "strict": strict,
        "tasks": tasks,
        "generate": generate,
        "followup": followup,
        "compression": compression,
        "model_name": model_name,
        "base_model_id": base_model_id,
        "check_memory": check_memory,
        "price_per_hour": price_per_hour,
        "budget": budget,
        "executor": executor,
        "ray_address": ray_address,
        "workers": workers,
        "worker_threads": worker_threads,
        "worker_gpus": worker_gpus,
    }
    from lorasmith.runs.config import load_config, to_toml

    resolved = load_config(config, flags)
    if print_config:
        typer.echo(to_toml(resolved), nl=False)
        return
    import lorasmith
    from lorasmith.cli.console import console
    from lorasmith.cli.gates import check_format, print_gates
    from lorasmith.cli.views import records
    from lorasmith.cli.views.run import TerminalWatcher, show_summary
    from lorasmith.runs.stages import read_timings

    shown = "json" if as_json else output_format
    check_format(shown)
    watcher = TerminalWatcher(console(stderr=shown != "text"))
    result = lorasmith.run(resolved, watcher=watcher, rehash=rehash)
    if shown != "text":
        print_gates(result.judged, shown)
    else:
        records.show_timings(list(read_timings(result.folder).values()), watcher.screen)
        show_summary(result, watcher.screen)
    raise typer.Exit(result.exit_code)
