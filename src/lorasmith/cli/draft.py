"""`lorasmith draft train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.draft import DraftRecord


def train(
    target: Annotated[Path, typer.Option(help="Folder of the model that is to be sped up.", metavar="DIR")],
    responses: Annotated[
        Path, typer.Option(help="Its responses, as `lorasmith respond` writes them.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the draft to.", metavar="DIR")],
    base: Annotated[
        str | None, typer.Option(help="Small model of the same tokenizer: folder or org/name.", metavar="DIR")
    ] = None,
    from_target: Annotated[
        bool, typer.Option("--from-target", help="Begin with layers of the target instead of --base.")
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Which layers of the target to keep, such as 0,2,4 or 0-3,8.")
    ] = None,
    cross_entropy_weight: Annotated[float, typer.Option(help="Of the target's tokens in the loss.")] = 1.0,
    kl_weight: Annotated[float, typer.Option(help="Of the target's stored probabilities.")] = 1.0,
    classifier_weight: Annotated[float, typer.Option(help="Of the difficulty classifier.")] = 0.1,
    labels: Annotated[
        str, typer.Option(help="Difficulty: auto, data (metadata.difficulty), confidence (easy/hard), none.")
    ] = "auto",
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows at most.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; longer responses are cut.")] = 1024,
    validation: Annotated[float, typer.Option(help="Fraction of rows that decides when to stop.")] = 0.1,
    held_out: Annotated[float, typer.Option(help="Fraction of rows that only the report sees.")] = 0.1,
    validate_every: Annotated[int, typer.Option(help="Steps between validations and checkpoints.")] = 50,
    patience: Annotated[int, typer.Option(help="Validations without a better one before it stops.")] = 3,
    device: Device = "auto",
    seed: Seed = 42,
    as_json: AsJson = False,
) -> None:
    """Train a draft model on a target's responses: a generator to speculate with, and a classifier.

    A killed training continues when the same command is given again, and ends with the same weights.

    Example: `lorasmith draft train --target models/merged --responses data/responses.jsonl
    --base models/small --output models/draft`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import UsageError
    from lorasmith.followup.draft import train_draft
    from lorasmith.followup.draft_base import parse_layers
    from lorasmith.followup.draft_settings import DraftSettings

    if from_target != (layers is not None):
        raise UsageError("--from-target and --layers go together", remedy="give both, or --base")
    settings = DraftSettings(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        cross_entropy_weight=cross_entropy_weight,
        kl_weight=kl_weight,
        classifier_weight=classifier_weight,
        labels=labels,
        validation=validation,
        held_out=held_out,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
    )
    record = train_draft(
        target,
        responses,
        output,
        base=base,
        layers=None if layers is None else parse_layers(layers),
        settings=settings,
        device=device,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        show_draft(record, console())
        console().print(f"Draft: {output}")


def show_draft(record: DraftRecord, screen: Console) -> None:
    """How it was trained, and what it can do on rows that it has not seen."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views import show_findings

    ratio = record.parameters / record.target_parameters
    early = ", stopped early" if record.stopped_early else ""
    screen.print(f"Draft of {record.parameters:,} parameters, {ratio:.1%} of the target's")
    if record.padded_rows:
        screen.print(
            f"  Vocabulary: {record.padded_rows:+d} rows, now {record.vocabulary:,} as in the target"
        )
    screen.print(
        f"  {record.train_rows} rows, {record.steps} steps{early}; the weights are those of step "
        f"{record.best_step}"
    )
    rows = []
    for name, found in (("before training", record.before), ("after", record.generator)):
        kl = "" if found.kl is None else f"{found.kl:.4f}"
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        rows.append((name, f"{found.loss:.4f}", _perplexity(found.perplexity), kl, agreement))
    title = f"Generator on {record.generator.rows} held-out rows ({record.generator.tokens:,} tokens)"
    screen.print(table(title, ("", "loss", "perplexity", "KL", "agreement"), rows))
    if record.classifier is not None:
        _show_classifier(record, screen)
    show_findings(record.findings, screen)


def _perplexity(value: float) -> str:
    """Of layers just cut out it has eight digits, of which none but the first means anything."""
    return f"{value:.3f}" if value < 1e4 else f"{value:.1e}"


def _show_classifier(record: DraftRecord, screen: Console) -> None:
    from lorasmith.cli.console import table

    found = record.classifier
    assert found is not None  # the caller looks
    rows: list[tuple[str, ...]] = [
        ("classifier", f"{found.accuracy:.2%}", f"{found.f1:.3f}", f"{found.calibration_error:.3f}"),
        (
            f"always {found.majority_label!r}",
            f"{found.majority_accuracy:.2%}",
            f"{found.majority_f1:.3f}",
            "–",
        ),
    ]
    origin = "the rows' own labels" if found.labels_from == "data" else "labels by the target's confidence"
    title = f"Classifier on {found.rows} held-out rows ({origin})"
    screen.print(table(title, ("", "accuracy", "F1", "calibration error"), rows))
    rows = [
        (name, *(str(count) for count in counts))
        for name, counts in zip(found.labels, found.confusion, strict=True)
    ]
    screen.print(table("Confusion", ("true, by predicted", *found.labels), rows))
