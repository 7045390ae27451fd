"""The model that all options are written in, and how a wrong value is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
    "Speed and memory",
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
    argument: bool = False
    """Whether it stands without a flag."""
    hidden: bool = False
    """Whether it is for programs only: neither a flag nor a line of help."""


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
    """The group of the help in which the fields that a class declares itself are shown."""

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
    return next(one.PANEL for one in model.__mro__ if issubclass(one, Options) and name in _own_fields(one))


def flag_name(model: type[Options], name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return flag_of(model, name).name or "--" + name.replace("_", "-")


def _own_fields(model: type[Options]) -> Mapping[str, Any]:
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
    *tables, last = [str(part) for part in first["loc"]] or [""]
    option = ".".join([*tables, last])
    known = not tables and last in model.model_fields
    flag = flag_name(model, last) if known else "--" + option.replace("_", "-")
    if first["type"] == "missing":
        return UsageError(
            f"{flag} is missing", where=where, remedy=f"give {flag}, or {option} in the config file"
        )
    if first["type"] == "extra_forbidden":
        return UsageError(
            f"there is no option {option!r}", where=where, expected=", ".join(_known(model, tables))
        )
    expected = _EXPECTED.get(first["type"], "").format(**first.get("ctx", {})).replace("'", "")
    if expected:
        return UsageError(f"{flag} is {first['input']!r}", where=where, expected=expected)
    return UsageError(f"{flag}: {first['msg']}", where=where)


def _known(model: type[BaseModel], tables: list[str]) -> list[str]:
    """The keys of a table in a config."""
    from typing import get_args

    kind: Any = model
    for name in tables:
        choices = get_args(kind.model_fields[name].annotation) if name in kind.model_fields else ()
        kind = next((choice for choice in choices if hasattr(choice, "model_fields")), kind)
    return list(kind.model_fields)
