"""The model that all options are written in, and how a wrong value is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from lorasmith.errors import UsageError, Where

PANELS = (
    "Options",
    "Merging",
    "Training",
    "Draft model",
    "Generation",
    "Compression",
    "Scoring",
    "Gates",
    "Package",
    "Speed and memory",
    "Cost",
    "Renting",
    "Cluster",
    "Display",
)
"""The groups of a command's help, those that are used most first."""


@dataclass(frozen=True)
class Flag:
    """How a field looks on the command line, where its name and type do not tell: metadata of the field."""

    metavar: str | None = None
    default: str | None = None
    """What happens where nothing is given, for a default that does not tell it (`None`)."""
    name: str | None = None
    """The flag, where it is not the field's name."""
    text: bool = False
    """Whether the value is one text that the model reads, such as `2,4,6`, or `auto` beside a number."""
    hidden: bool = False
    """Whether it is for programs and config files only: neither a flag nor a line of help."""
    hub: bool = False
    """Whether a path may be the name of a model on the hub."""


class Options(BaseModel):
    """A group of options: frozen, no unknown names, the docstring of a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        defer_build=True,
    )

    PANEL: ClassVar[str] = PANELS[0]
    """The group of the help for the fields that a class itself declares; not inherited."""

    @classmethod
    def make(cls, values: Mapping[str, Any] | None = None, *, where: Where | None = None) -> Self:
        """The options with these values in place of defaults; a `UsageError` names the first wrong one."""
        try:
            return cls.model_validate(dict(values or {}))
        except ValidationError as error:
            raise usage_error(cls, error, where) from error

    @classmethod
    def given(cls, options: Self | None, keywords: Mapping[str, Any]) -> Self:
        """What a public function was given: options as one object, or each as a keyword."""
        if options is None:
            return cls.make(keywords)
        if keywords:
            raise UsageError("both options and single keywords were given", expected="one of them")
        return options

    @classmethod
    def taken_from(cls, *sources: Options, **own: Any) -> Self:
        """Every field from the first source that has one of that name; `own` before all of them."""
        values = dict(own)
        for source in sources:
            for name in cls.model_fields.keys() & type(source).model_fields.keys():
                values.setdefault(name, getattr(source, name))
        return cls.make(values)

    def values(self) -> dict[str, Any]:
        """Name → value, nested groups left as they are."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def flag_of(model: type[Options], name: str) -> Flag:
    """How a field looks on the command line."""
    return next((item for item in model.model_fields[name].metadata if isinstance(item, Flag)), Flag())


def panel_of(model: type[Options], name: str) -> str:
    """The group of the help in which a field is shown: that of the class that declares it."""
    declares = next(one for one in model.__mro__ if name in _own_fields(one))
    return vars(declares).get("PANEL", PANELS[0])


def help_line(model: type[Options], name: str) -> str:
    """The docstring of a field as one line."""
    return " ".join((model.model_fields[name].description or "").split())


def flag_name(model: type[Options], name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return flag_of(model, name).name or "--" + name.replace("_", "-")


def in_order(model: type[Options]) -> Iterator[str]:
    """The fields that a class declares itself, then those of its bases."""
    declared = [name for one in model.__mro__ for name in _own_fields(one)]
    return (name for name in dict.fromkeys(declared) if name in model.model_fields)


def with_paths(
    model: type[BaseModel], values: Mapping[str, Any], change: Callable[[str, Flag], Any]
) -> dict[str, Any]:
    """Values of a config file, with what `change` makes of each text that a field takes for a path."""
    found, paths = dict(values), path_fields(model)
    for name, field in model.model_fields.items():
        value, kinds = found.get(name), _kinds(field.annotation)
        table = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)), None)
        if table is not None and isinstance(value, Mapping):
            found[name] = with_paths(table, value, change)
        elif name in paths:
            flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
            texts = value if isinstance(value, list) else [value]
            changed = [change(text, flag) if isinstance(text, str) else text for text in texts]
            if value is not None:
                found[name] = changed if isinstance(value, list) else changed[0]
    return found


def path_fields(model: type[BaseModel]) -> tuple[str, ...]:
    """The fields that name files or folders."""
    return tuple(name for name, field in model.model_fields.items() if Path in _kinds(field.annotation))


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = [part for part in get_args(annotation) if isinstance(part, type) or get_args(part)]
    return {annotation}.union(*(_kinds(part) for part in parts)) if parts else {annotation}


def _own_fields(model: type) -> Mapping[str, Any]:
    return vars(model).get("__annotations__", {})


_EXPECTED = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
}
"""What pydantic calls a mistake → what was expected."""


def usage_error(model: type[Options], error: ValidationError, where: Where | None = None) -> UsageError:
    """The first mistake that pydantic found, as a message of ours."""
    first = error.errors()[0]
    place = first["loc"]
    option = ".".join(str(part) for part in place)
    # The place of an item in a list is no part of a flag.
    own = bool(place) and place[0] in model.model_fields and all(isinstance(one, int) for one in place[1:])
    flag = flag_name(model, str(place[0])) if own else option
    if first["type"] == "missing":
        return UsageError(
            f"{flag} is missing",
            where=where,
            remedy=f"give {flag}, or {option} in the config file" if own else f"give {option}",
        )
    if first["type"] == "extra_forbidden":
        return UsageError(
            f"there is no option {option!r}", where=where, expected=", ".join(_known(model, place[:-1]))
        )
    expected = _EXPECTED.get(first["type"], "").format(**first.get("ctx", {})).replace("'", "")
    if expected:
        found = str(first["input"]) if first["type"].startswith(("greater", "less")) else repr(first["input"])
        return UsageError(f"{flag} is {found}", where=where, expected=expected)
    return UsageError(f"{flag}: {first['msg']}", where=where)


def _known(model: type[BaseModel], tables: Sequence[str | int]) -> list[str]:
    """The keys of a table in a config."""
    kind = model
    for name in map(str, tables):
        kinds = _kinds(kind.model_fields[name].annotation) if name in kind.model_fields else set()
        kind = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), kind)
    return list(kind.model_fields)
