"""The templates, what they may call, and the policy under which a page runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorasmith.files.machine import human_bytes
from lorasmith.reporting import figures
from lorasmith.reporting.groups import ALL


def render_page(template: str, view: dict[str, Any], *, scripts: Sequence[str] = ()) -> str:
    """A whole page: the template with our style sheet, our script and a policy that admits nothing else."""
    script = "".join(_asset(name) for name in ("page.js", *scripts))
    own = {"css": Markup(_asset("page.css")), "js": Markup(script), "policy": _policy(script)}
    return _environment().get_template(template).render({**view, **own})


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorasmith.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number=figures.number,
        plain=figures.plain,
        plural=figures.plural,
        signed=figures.signed,
        percent=figures.percent,
        count=figures.count,
        duration=figures.duration,
        dollars=figures.dollars,
        energy=figures.energy,
        human_bytes=human_bytes,
        comparisons={"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠"},
        all_examples=ALL,
    )
    return environment


def _asset(name: str) -> str:
    return (files("lorasmith.reporting") / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A content security policy under which only our own script runs and no request leaves the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
