"""Chat templates are programs that come with a model: they run in another process, within time and memory.

Jinja's sandbox keeps them from files and from Python's insides, not from loops without an end or texts that
fill the memory; and nothing can stop those within the process itself.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorasmith.errors import CheckpointError, MachineError, UsageError, os_errors
from lorasmith.files.inputs import read_input
from lorasmith.models.template_worker import MEMORY_BYTES
from lorasmith.parsing import parse_json

CPU_SECONDS = 5.0
"""Processor time of one rendering; honest templates take milliseconds."""

Message = dict[str, Any]
"""`{"role": …, "content": …}`, and what else a template may know: `tool_calls`, `reasoning_content`, …"""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "conversations")
"""Names that a template is given anyway, so that no argument may have them."""


class TemplateRefusal(ValueError):
    """The template does not render these messages; the text is its own, or jinja's."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation."""

    text: str
    answers: list[tuple[int, int]]
    """Where in the text the parts between `{% generation %}` and `{% endgeneration %}` stand."""


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    start_answer: bool,
    tools: Sequence[dict[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation, up to where the assistant begins to write where `start_answer` is set.

    `arguments` are further names that the template may ask for, such as `enable_thinking`. Raises
    `TemplateRefusal` for what the template cannot lay out, and `CheckpointError` for a template that takes
    longer than it may.
    """
    return _render(tokenizer, messages, start_answer, tools, arguments or {}, mark=False).text


def render_marked(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """A whole conversation, and where its answers stand if the template says so; raises as `render` does."""
    marks = _uses_jinja(tokenizer) and bool(_GENERATION.search(template_of(tokenizer, tools)))
    return _render(tokenizer, messages, False, tools, arguments or {}, mark=marks)


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def use_template(tokenizer: Any, named: Path | None) -> None:
    """Give a tokenizer another chat template: that of a file, or one of several of its own by its name.

    Raises `UsageError` for what is neither.
    """
    if named is None:
        return
    own = getattr(tokenizer, "chat_template", None)
    if named.is_file():
        with os_errors(named, "read"):
            content = read_input(named)
        if len(content) > _LARGEST_TEMPLATE:
            raise UsageError("the file is too large for a chat template", where=named)
        try:
            tokenizer.chat_template = _template_text(content, named)
        except UnicodeDecodeError as error:
            raise UsageError("the chat template is not UTF-8 text", where=named) from error
    elif isinstance(own, dict) and str(named) in own:
        tokenizer.chat_template = own[str(named)]
    else:
        known = ", ".join(own) if isinstance(own, dict) else ""
        raise UsageError(
            f"there is no chat template {str(named)!r}",
            expected="a jinja file" + (f", or one of the tokenizer's: {known}" if known else ""),
        )


_LARGEST_TEMPLATE = 1 << 20


def _template_text(content: bytes, path: Path) -> str:
    """The template itself, which `chat_template.json` holds as a field."""
    if path.suffix != ".json":
        return content.decode("utf-8-sig")
    try:
        held = parse_json(content).get("chat_template")
    except (ValueError, AttributeError):
        held = None
    if not isinstance(held, str):
        raise UsageError(
            "the file holds no chat template", where=path, expected='{"chat_template": "…"}, or a jinja file'
        )
    return held


def template_of(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """The template that is used, of several the one for tools or `default`; `TemplateRefusal` for none."""
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) or None))
    except ValueError as error:
        raise TemplateRefusal(str(error)) from error


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    start_answer: bool,
    tools: Sequence[dict[str, Any]],
    arguments: Mapping[str, Any],
    *,
    mark: bool,
) -> Rendered:
    if not _uses_jinja(tokenizer):
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=start_answer,
                tokenize=False,
                **arguments,
            )
        except (ValueError, TypeError) as error:
            raise TemplateRefusal(str(error)) from error
        return Rendered(str(text), [])
    template = template_of(tokenizer, tools)
    request = {
        "messages": list(messages),
        "start_answer": start_answer,
        "mark_answers": mark,
        "tools": list(tools) or None,
        "arguments": dict(arguments),
        "special_tokens": {
            name: [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if name not in arguments
        },
    }
    answer = _renderer().ask(template, request)
    if answer is None:
        raise CheckpointError(
            "the chat template does not come to an end",
            where=getattr(tokenizer, "name_or_path", None),
            expected=f"a text within {CPU_SECONDS:g} s of processor time and {MEMORY_BYTES >> 20} MiB",
            remedy="read its chat_template.jinja before you trust this model, or give --template plain",
        )
    if "text" not in answer:
        raise TemplateRefusal(answer.get("error", ""))
    return Rendered(answer["text"], [(start, stop) for start, stop in answer.get("answers", [])])


def _uses_jinja(tokenizer: Any) -> bool:
    """Whether it renders as transformers does; tokenizers of mistral-common need no template."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is PreTrainedTokenizerBase.apply_chat_template


class _Renderer:
    """The other process; it is started once, and again after it was ended by a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._template = ""

    def ask(self, template: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process ended over it."""
        with self._lock:
            process = self._process or self._start()
            if template != self._template:  # sent once, not with each row
                request = {**request, "template": template}
            assert process.stdin is not None
            assert process.stdout is not None
            line = ""
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            if not line:
                self.stop()
                return None
            self._template = template
            return cast(dict[str, Any], json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        # -P: a folder that the command is given in must not lend its modules to the process.
        command = [sys.executable, "-P", "-m", "lorasmith.models.template_worker", str(CPU_SECONDS)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self._template = ""
        # An empty template shows that it works: what ends it later is the template.
        started = {"template": "", "messages": [], "start_answer": False, "special_tokens": {}}
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(started) + "\n")
            self._process.stdin.flush()
            if self._process.stdout.readline():
                return self._process
        self.stop()
        raise MachineError(
            "the process that renders chat templates does not start",
            where=sys.executable,
            remedy="run `python -P -m lorasmith.models.template_worker 5` to see why",
        )

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with process:  # closes its pipes and waits
            pass


_renderers: dict[int, _Renderer] = {}
"""One for each process: a fork must not share the pipes of its parent."""


def _renderer() -> _Renderer:
    pid = os.getpid()
    if pid not in _renderers:
        _renderers[pid] = renderer = _Renderer()
        atexit.register(renderer.stop)
    return _renderers[pid]
