"""Tokens and boundaries: what the model is shown, and which tokens are scored."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.models.text import Encoded, Manner, encode_example, encode_examples, frame, resolve_template
from lorasmith.records.dataset import Example, Metadata
from tests.tiny import tiny_tokenizer

END, PAD, BOS, EOS = "<|end|>", "<pad>", "<s>", "</s>"
HUMAN_EVAL = "    for x in xs:\n        return x\n"


def example(prompt: str = "say it", response: str = "the end") -> Example:
    return Example(id="one", prompt=prompt, response=response, metadata=Metadata(source="s"))


def encode(
    example: Example,
    tokenizer: Any,
    *,
    template: str = "auto",
    end_of_turn: bool = True,
    max_length: int | None = None,
) -> Encoded:
    around = frame(tokenizer, template, end_of_turn=end_of_turn)
    return encode_example(example, tokenizer, Manner(around), max_length=max_length)


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts <s> before every text, as Llama's do."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def dummy_prefix_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before every text it gets, as Llama 2's does (SentencePiece's dummy prefix)."""
    letters = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyz:()"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    for left, right in [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "t")]:
        vocab[left + right] = len(vocab)
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "t")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_chat_prompt_response_and_the_templates_own_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = EOS  # as in many chat models: generation ends with another token than EOS
    encoded = encode(example(), tokenizer)
    text = tokenizer.decode(encoded.ids[: encoded.n_prompt])
    assert text == "<|start|>user\nsay it<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "the end<|end|>"
    assert encoded.scored_at[0] == encoded.n_prompt


def test_plain_ends_with_eos_and_end_of_turn_can_be_left_out() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    assert tokenizer.decode(encode(example(), tokenizer).ids) == "say itthe end</s>"
    bare = encode(example(), tokenizer, end_of_turn=False)
    assert tokenizer.decode(bare.ids) == "say itthe end"


def test_a_bos_of_tokenizer_and_template_is_never_doubled() -> None:
    chat = with_bos(tiny_tokenizer())
    chat.chat_template = "{{ bos_token }}" + chat.chat_template
    assert encode(example(), chat).ids.count(chat.bos_token_id) == 1
    plain = with_bos(tiny_tokenizer(chat=False))
    assert encode(example(), plain).ids.count(plain.bos_token_id) == 1
    written = encode(example(prompt="<s>say it"), plain)
    assert written.ids.count(plain.bos_token_id) == 1


def test_a_bos_that_the_tokenizer_adds_is_not_lost() -> None:
    plain = with_bos(tiny_tokenizer(chat=False))
    assert encode(example(), plain).ids[0] == plain.bos_token_id
    assert encode(example(), tiny_tokenizer(chat=False)).ids[0] != plain.bos_token_id


def test_a_straddling_row_is_scored_apart_and_counted() -> None:
    tokenizer = tiny_tokenizer(chat=False)  # merges t + h and th + e
    rows = encode_examples(
        [example("a t", "he cat"), example("a ", "cat")], tokenizer, max_length=100, end_of_turn=False
    )
    assert [row.straddling for row in rows.rows] == [True, False]
    assert rows.straddling == 1
    joined = tokenizer("a the cat", add_special_tokens=False)["input_ids"]
    assert len(rows.rows[0].ids) > len(joined)  # the real prompt ends in "t", so "the" is no single token


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_indent_of_the_first_line_survives(template: str) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(example("def f(xs):\n", HUMAN_EVAL), tokenizer, template=template, end_of_turn=False)
    assert tokenizer.decode(encoded.ids[encoded.n_prompt :]) == HUMAN_EVAL


def test_a_dummy_prefix_adds_no_space_to_a_plain_response() -> None:
    tokenizer = dummy_prefix_tokenizer()
    assert not frame(tokenizer, "plain", end_of_turn=False).keeps_spaces
    encoded = encode(example("def f(xs):\n", HUMAN_EVAL), tokenizer, template="plain", end_of_turn=False)
    spelled = "".join(tokenizer.convert_ids_to_tokens(encoded.ids[encoded.n_prompt :]))
    assert spelled.replace("▁", " ") == HUMAN_EVAL


def test_a_long_row_loses_the_beginning_of_its_prompt_but_bos() -> None:
    tokenizer = with_bos(tiny_tokenizer(chat=False))
    whole = encode(example("abcdefgh", "xyz"), tokenizer)
    cut = encode(example("abcdefgh", "xyz"), tokenizer, max_length=8)
    assert tokenizer.decode(cut.ids) == "<s>fghxyz</s>"
    assert cut.truncated == len(whole.ids) - 8 == 5
    assert cut.scored == whole.scored


def test_a_response_longer_than_the_limit_loses_its_end() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    cut = encode(example("abc", "vwxyz"), tokenizer, max_length=4)
    assert tokenizer.decode(cut.ids) == "cvwx"
    assert (cut.n_prompt, cut.truncated) == (1, 5)


def test_strict_refuses_a_row_longer_than_the_limit_by_name() -> None:
    with pytest.raises(DataError, match="one") as caught:
        encode_examples([example("a" * 50)], tiny_tokenizer(), max_length=20, strict=True)
    assert "20 tokens" in caught.value.message()


def test_loss_on_all_scores_everything_but_the_first_token() -> None:
    rows = encode_examples([example()], tiny_tokenizer(), max_length=100, loss_on="all").rows
    assert rows[0].scored == len(rows[0].ids) - 1
    with pytest.raises(UsageError, match="prompt"):
        encode_examples([example()], tiny_tokenizer(), max_length=100, loss_on="prompt")


def test_templates_are_resolved_by_the_tokenizer() -> None:
    assert resolve_template(tiny_tokenizer(), "auto") == "chat"
    assert resolve_template(tiny_tokenizer(chat=False), "auto") == "plain"
    with pytest.raises(UsageError, match="no chat template"):
        resolve_template(tiny_tokenizer(chat=False), "chat")
    with pytest.raises(UsageError, match="alpaca"):
        resolve_template(tiny_tokenizer(), "alpaca")


def test_a_broken_template_and_a_missing_end_token_are_named() -> None:
    broken = tiny_tokenizer()
    broken.chat_template = "{{ raise_exception('only three roles') }}"
    with pytest.raises(CheckpointError, match="only three roles"):
        encode(example(), broken)
    endless = tiny_tokenizer(chat=False)
    endless.eos_token = None
    with pytest.raises(CheckpointError, match="ends a response") as caught:
        encode(example(), endless)
    assert "--no-end-of-turn" in caught.value.message()
