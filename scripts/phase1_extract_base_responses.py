#!/usr/bin/env python3
"""The guide's prerequisite of Phase 1E by its own name: answer every row of the training file.

Writes the responses to --output_file, and beside it the record (.json), with --top_logprobs the likeliest
tokens at each place (.logprobs.parquet), and the rows that have no answer (.failed.jsonl). Killed at any
point, the same command goes on where it was. Says after the first hundred rows when --max_new_tokens cuts
answers off. Exits 1 when rows failed. See `lorasmith respond`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lorasmith.cli.main import guarded
from lorasmith.errors import ExitCode


def main() -> int:
    """Returns 0, 1 when rows have no answer, or the exit code of an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True, help="the merged model")
    parser.add_argument("--data_file", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch_size", type=int, help="rows under way at once")
    parser.add_argument("--top_logprobs", type=int)
    parser.add_argument("--engine", help="transformers or vllm")
    parser.add_argument("--price_per_hour", type=float)
    parser.add_argument("--device")
    asked = parser.parse_args()
    return guarded(lambda: extract(asked))


def extract(asked: argparse.Namespace) -> int:
    """Answer the rows and print how they ended."""
    from lorasmith.cli.console import console
    from lorasmith.cli.respond import TerminalRespond
    from lorasmith.cli.views.followup import show_responses
    from lorasmith.followup.responses.respond import respond
    from lorasmith.options import RespondOptions

    given = {name: value for name, value in vars(asked).items() if value is not None}
    options = RespondOptions.make(
        {name: given[name] for name in RespondOptions.model_fields if name in given}
    )
    watcher = TerminalRespond(asked.price_per_hour)
    record = respond(asked.model_path, asked.data_file, asked.output_file, options=options, watcher=watcher)
    show_responses(record, asked.output_file, console())
    return ExitCode.ANSWER_IS_NO if record.failed else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
