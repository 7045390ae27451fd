"""Train a LoRA adapter with PEFT: small, seeded, on response tokens only."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

import lorasmith
from lorasmith.data.rows import read_rows
from lorasmith.data.sources import local_rows
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import StrPath, aside, publish_folder, write_bytes, write_record
from lorasmith.files.digests import describe, digest_folder
from lorasmith.files.output_folder import require_own_place
from lorasmith.models.batches import split_batch
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.device import resolve_device
from lorasmith.models.load import load_model, quiet_libraries
from lorasmith.models.text import Encoded, encode_examples
from lorasmith.options import TrainOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.followup import TrainRecord

RECORD = "lorasmith_train.json"


@documented(TrainOptions)
def train(
    base: StrPath,
    train_file: StrPath,
    output: StrPath,
    *,
    options: TrainOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> TrainRecord:
    """Train an adapter on the responses of `train_file` and write it to `output` as PEFT does.

    The arithmetic is bfloat16 by autocast over the base's own weights; the adapter is float32. The same
    inputs, options, versions and device class give the same adapter. Raises `InputError` for a wrong base
    or file, and when every row is cut before its response, `UsageError` for an output that is not ours to
    replace.
    """
    base, output = Path(base), Path(output)
    chosen = TrainOptions.given(options, given)
    train_file = local_rows(train_file, chosen)
    require_own_place(output, RECORD, [base])
    read = read_rows(train_file)
    loaded = load_model(base, device=resolve_device(chosen.device), dtype=torch.bfloat16)
    use_template(loaded.tokenizer, chosen.chat_template)
    encoded = encode_examples(
        read.examples,
        loaded.tokenizer,
        template=chosen.template,
        end_of_turn=chosen.end_of_turn,
        max_length=chosen.max_length,
        loss_on=chosen.loss_on,
        boundary=chosen.boundary,
        wording=Wording.of(chosen),
    )
    usable = [row for row in encoded.rows if row.scored]
    if not usable:
        raise DataError(
            f"no row keeps a response within {chosen.max_length} tokens",
            where=train_file,
            remedy="raise --max-length",
        )
    model = _add_adapter(loaded.model, chosen)
    batches = list(make_batches(usable, chosen))
    losses, tokens = _optimise(model, batches, chosen, progress)
    record = TrainRecord(
        lorasmith_version=lorasmith.__version__,
        base_sha256=digest_folder(base),
        train=describe([train_file], train_file.parent)[0],
        settings=chosen.model_dump(exclude={"device"}),
        template=encoded.template,
        examples=len(usable),
        tokens=tokens,
        truncated=encoded.truncated,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        losses=losses,
        findings=read.findings,
    )
    _save(model, loaded.tokenizer, record, output)
    return record


def _add_adapter(model: torch.nn.Module, options: TrainOptions) -> PeftModel:
    torch.manual_seed(options.seed)
    wanted = options.target_modules
    targets: str | list[str] = (
        wanted if wanted == "all-linear" else [name.strip() for name in wanted.split(",")]
    )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_libraries():
            return get_peft_model(model, config).train()
    except ValueError as error:
        raise UsageError(
            f"no layer of this model is named {wanted!r}",
            expected="all-linear, or names of linear layers such as q_proj,v_proj",
        ) from error


_GROUP = 32
"""Batches that are sorted by length together: large enough to save padding, small enough to stay random."""


def make_batches(rows: Sequence[Encoded], options: TrainOptions) -> Iterator[list[Encoded]]:
    """Seeded batches of rows of similar length; the last epoch may be a fraction.

    Each epoch shuffles the rows, sorts groups of `_GROUP` batches by length and shuffles the batches, so that
    little is spent on padding and no order is learnt.
    """
    total = math.ceil(options.epochs * len(rows) / options.batch_size)
    generator = np.random.Generator(np.random.PCG64(options.seed))
    group = _GROUP * options.batch_size
    made = 0
    while made < total:
        order = generator.permutation(len(rows)).tolist()
        batches = []
        for start in range(0, len(rows), group):
            near = sorted(order[start : start + group], key=lambda index: len(rows[index].ids))
            batches += [near[at : at + options.batch_size] for at in range(0, len(near), options.batch_size)]
        for number in generator.permutation(len(batches))[: total - made]:
            yield [rows[index] for index in batches[number]]
            made += 1


_PART_TOKENS = 1024
"""Padded tokens of one forward and backward pass: the memory of training grows with it."""


def _optimise(
    model: PeftModel, batches: Sequence[list[Encoded]], options: TrainOptions, progress: Progress
) -> tuple[list[float], int]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, len(batches), options.warmup)
    )
    device = parameters[0].device
    losses: list[float] = []
    scored = 0
    total = sum(len(row.ids) for batch in batches for row in batch)
    with progress("Training", total=total, unit="tok") as advance:
        for batch in batches:
            tokens = sum(row.scored for row in batch)
            loss = 0.0
            for part in split_batch(batch, _PART_TOKENS):
                mean, count = batch_loss(model, part, device)
                share = mean * (count / tokens)
                share.backward()
                loss += share.item()
            torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(round(loss, 6))
            scored += tokens
            advance(sum(len(row.ids) for row in batch))
    return losses, scored


def _rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: a linear rise, then half a cosine down to 0.1."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def batch_loss(model: Any, batch: Sequence[Encoded], device: torch.device) -> tuple[torch.Tensor, int]:
    """Mean negative log-likelihood per response token of the batch, and the number of those tokens.

    Rows are padded on the right, where a causal model cannot see the padding from a scored position. Logits
    are made at the positions before response tokens only: a hook hands the head nothing else.
    """
    length = max(len(row.ids) for row in batch)
    ids = torch.zeros((len(batch), length), dtype=torch.long)
    scored = torch.zeros((len(batch), length), dtype=torch.bool)
    for index, row in enumerate(batch):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        scored[index, row.scored_at] = True
    targets = ids[scored].to(device)
    before = scored.roll(-1, dims=1).to(device)
    before[:, -1] = False

    def select(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][before].unsqueeze(0), *arguments[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
    finally:
        hook.remove()
    return cross_entropy(logits.float(), targets), len(targets)


def _save(model: PeftModel, tokenizer: object, record: TrainRecord, output: Path) -> None:
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)  # type: ignore[attr-defined]
    _sort_config(temporary / "adapter_config.json")
    write_record(temporary / RECORD, record)
    publish_folder(temporary, output)


def _sort_config(path: Path) -> None:
    """PEFT writes sets in an order that changes from process to process: sorted, the bytes stay the same."""
    config = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_bytes(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
