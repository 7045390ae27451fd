"""What the draft learns from: the target's tokens, its stored probabilities, the difficulty of the prompt.

B rows, N response tokens of all of them, K stored tokens at each, V vocabulary, H hidden size, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lorasmith.followup.drafts.rows import DraftRow
from lorasmith.options import DraftOptions

_LEAST_REST = 1e-7
"""Probability below which the mass outside the stored tokens counts as this much: float32 cannot tell it from
the rounding of a sum near 1."""


@dataclass(frozen=True)
class Weights:
    """How much each of the three parts of the loss counts."""

    cross_entropy: float
    kl: float
    classifier: float

    @classmethod
    def of(cls, options: DraftOptions) -> Weights:
        """The weights that were asked for."""
        return cls(options.cross_entropy_weight, options.kl_weight, options.classifier_weight)


@dataclass
class Outputs:
    """The forward of one batch at the places that count."""

    logits: torch.Tensor
    """[N, V] float32: before each response token, row after row."""
    prompt: torch.Tensor
    """[B, H]: the final hidden state at the last prompt token."""
    targets: torch.Tensor
    """[N]"""


def forward(model: Any, rows: Sequence[DraftRow], device: torch.device) -> Outputs:
    """Logits before response tokens only, and hidden states at the ends of the prompts, from one forward.

    Rows are padded on the right, where a causal model cannot see the padding. A hook before the head takes
    the hidden states and hands it nothing but the places that count.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    before = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        # The logits at a place speak of the token after it: from the prompt's last to the last but one.
        before[index, row.n_prompt - 1 : len(row.ids) - 1] = True
    ends = torch.tensor([row.n_prompt - 1 for row in rows], device=device)
    places = before.to(device)
    taken: list[torch.Tensor] = []

    def select(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0]
        # Logits of every place would be the largest tensor of the step: vocabulary × all tokens.
        taken.append(hidden[torch.arange(len(rows), device=device), ends])
        return (hidden[places].unsqueeze(0), *arguments[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
    finally:
        hook.remove()
    return Outputs(logits.float(), taken[0].float(), ids.roll(-1, 1)[before].to(device))


def topk_kl(logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor) -> torch.Tensor:
    """[N] KL(target ‖ draft) over K + 1 outcomes, the stored tokens and all others together, in nats.

    By the data-processing inequality it is never above the KL over the whole vocabulary; with all of the
    vocabulary stored it is that KL. `top_ids`, `top_logprobs` [N, K]; an id of −1 is no token.
    """
    own = logits.log_softmax(-1)
    known = top_ids >= 0  # a filled-up place has log-probability 0, which would count as certainty
    q = own.gather(-1, top_ids.clamp(min=0))
    p = top_logprobs.exp() * known
    terms = torch.where(known, p * (top_logprobs - q), torch.zeros_like(q)).sum(-1)
    rest_p = (1 - p.sum(-1)).clamp(min=0.0)
    rest_q = (1 - (q.exp() * known).sum(-1)).clamp(min=_LEAST_REST)
    rest = rest_p * (rest_p.clamp(min=_LEAST_REST).log() - rest_q.log())
    # A rest of 0 in the target contributes 0 · log 0 = 0, whatever the draft puts there.
    return terms + torch.where(rest_p > _LEAST_REST, rest, torch.zeros_like(rest))


def stored(rows: Sequence[DraftRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stored tokens and log-probabilities of all rows as [N, K]; None when there are none."""
    if any(row.top_ids is None for row in rows):
        return None
    width = max(row.top_ids.shape[1] for row in rows if row.top_ids is not None)
    count = sum(row.scored for row in rows)
    ids = torch.full((count, width), -1, dtype=torch.long)
    logprobs = torch.zeros((count, width))
    start = 0
    for row in rows:
        assert row.top_ids is not None and row.top_logprobs is not None  # looked at above
        n, k = row.top_ids.shape
        ids[start : start + n, :k] = torch.from_numpy(row.top_ids)
        logprobs[start : start + n, :k] = torch.from_numpy(row.top_logprobs)
        start += n
    return ids.to(device), logprobs.to(device)


def batch_loss(
    model: Any,
    head: torch.nn.Linear | None,
    rows: Sequence[DraftRow],
    weights: Weights,
    device: torch.device,
    *,
    tokens: int,
    labelled: int,
) -> torch.Tensor:
    """This part's share of the weighted loss of a batch with `tokens` response tokens and `labelled` rows.

    Cross-entropy and KL are means over tokens, the classifier's cross-entropy over rows with a label; parts
    of a batch add up to the batch.
    """
    out = forward(model, rows, device)
    loss = weights.cross_entropy * cross_entropy(out.logits, out.targets, reduction="sum") / tokens
    tops = stored(rows, device) if weights.kl else None
    if tops is not None:
        loss = loss + weights.kl * topk_kl(out.logits, *tops).sum() / tokens
    labels = torch.tensor([row.label for row in rows], device=device)
    if head is not None and labelled and bool((labels >= 0).any()):
        classified = cross_entropy(head(out.prompt), labels, ignore_index=-1, reduction="sum")
        loss = loss + weights.classifier * classified / labelled
    return loss
