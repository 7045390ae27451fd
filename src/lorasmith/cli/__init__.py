"""The command line: `main.py`, and one thin file per command, listed here.

A command file imports only typer at its top; what it needs to work it imports when it is called, so that
`--help` answers at once. To add a command, write its file and name it below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorasmith.cli import benchmarks, data, draft, testset
from lorasmith.cli.chat import chat
from lorasmith.cli.compare import compare
from lorasmith.cli.compress import compress
from lorasmith.cli.costs import costs
from lorasmith.cli.demo import demo
from lorasmith.cli.doctor import doctor
from lorasmith.cli.gates import gates
from lorasmith.cli.merge import merge
from lorasmith.cli.package import package, publish, unpack, verify
from lorasmith.cli.prove import prove
from lorasmith.cli.remote import jobs, rentals
from lorasmith.cli.report import report
from lorasmith.cli.respond import respond
from lorasmith.cli.run import run
from lorasmith.cli.speculate import speculate
from lorasmith.cli.train import train
from lorasmith.cli.validate import validate

COMMANDS: list[tuple[str, Callable[..., Any]]] = [
    ("demo", demo),
    ("doctor", doctor),
    ("run", run),
    ("train", train),
    ("validate", validate),
    ("merge", merge),
    ("prove", prove),
    ("compare", compare),
    ("gates", gates),
    ("costs", costs),
    ("report", report),
    ("package", package),
    ("publish", publish),
    ("unpack", unpack),
    ("verify", verify),
    ("respond", respond),
    ("speculate", speculate),
    ("chat", chat),
    ("compress", compress),
]

GROUPS: list[tuple[str, str, list[tuple[str, Callable[..., Any]]]]] = [
    ("data", "Look at rows.", [("show", data.show)]),
    (
        "testset",
        "Build, split and check test sets.",
        [("build", testset.build), ("split", testset.split), ("check", testset.check)],
    ),
    (
        "benchmarks",
        "List and fetch public benchmarks.",
        [("list", benchmarks.list_), ("fetch", benchmarks.fetch)],
    ),
    ("draft", "Train a draft model for speculative decoding.", [("train", draft.train)]),
    (
        "remote",
        "Work on another machine, by ssh or rented.",
        [
            ("run", jobs.run),
            ("attach", jobs.attach),
            ("status", jobs.status),
            ("logs", jobs.logs),
            ("fetch", jobs.fetch),
            ("stop", jobs.stop),
            ("offers", rentals.offers),
            ("up", rentals.up),
            ("down", rentals.down),
            ("list", rentals.list_),
            ("reap", rentals.reap),
        ],
    ),
]
