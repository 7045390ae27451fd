"""Do two models fit together: one vocabulary, and the same tokens from either folder?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.checkpoint.model import text_config
from lorasmith.errors import CheckpointError
from lorasmith.models.encode import encode_examples
from lorasmith.models.load import has_tokenizer, load_tokenizer, require_file
from lorasmith.models.session import Workload
from lorasmith.models.template import resolve_template
from lorasmith.records.base import Finding


def model_config(folder: Path) -> dict[str, Any]:
    """Its config.json; raises `CheckpointError` where there is none."""
    require_file(folder, "config.json", CheckpointError)
    return read_object(folder / "config.json", CheckpointError)


def announced_vocabulary(folder: Path) -> int | None:
    """As its config says it: known before the model is loaded."""
    announced = text_config(model_config(folder)).get("vocab_size")
    return announced if isinstance(announced, int) else None


def check_vocabulary(ours: int, merged: int | None, folder: Path) -> None:
    """Raise `CheckpointError` where the merged model has another number of embedding rows."""
    if merged is not None and ours != merged:
        raise CheckpointError(
            f"the merged model has {merged:,} embedding rows, base and adapter {ours:,}",
            where=folder,
            expected="two models of one vocabulary",
            remedy="merge this adapter into this base again",
        )


def compare_tokenizers(work: Workload, folder: Path) -> tuple[list[str], list[Finding]]:
    """Would the merged folder put the same tokens to its model? Obstacles to a grade, and findings."""
    if not has_tokenizer(folder):
        finding = Finding(
            severity="warning",
            code="no-tokenizer",
            message="the merged folder has no tokenizer; the adapter's was used for both models",
            where=folder.name,
            remedy="copy the tokenizer files into it, or merge again",
        )
        return [], [finding]
    tokenizer, template = load_tokenizer(folder), work.settings.template
    if resolve_template(tokenizer, "auto") == "plain" and template == "chat":
        different = len(work.rows)
    else:
        own = encode_examples(
            work.examples,
            tokenizer,
            template=template,
            end_of_turn=work.settings.end_of_turn,
            max_length=work.settings.max_length,
            loss_on=work.settings.loss_on,
        )
        different = sum(one.ids != two.ids for one, two in zip(work.rows, own.rows, strict=True))
    if not different:
        return [], []
    message = f"the merged folder's own tokenizer or chat template gives other tokens on {different} rows"
    finding = Finding(
        severity="error",
        code="tokenizer-differs",
        message=message,
        where=folder.name,
        expected="the tokenizer and the chat template that the adapter is used with",
        remedy="copy the tokenizer files and the chat template of the adapter into it, or merge again",
    )
    return [message], [finding]
