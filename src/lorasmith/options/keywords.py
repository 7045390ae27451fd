"""The keywords of a public function, shown from the model that they are the fields of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lorasmith.options.base import Options, help_line, in_order

F = TypeVar("F", bound=Callable[..., Any])


def documented(model: type[Options]) -> Callable[[F], F]:
    """Shows `**given` of a function as the fields of a model, in its signature and in its docstring."""

    def show(function: F) -> F:
        written = inspect.signature(function)
        own = [one for one in written.parameters.values() if one.kind is not one.VAR_KEYWORD]
        known = {one.name for one in own}
        names = [name for name in in_order(model) if name not in known]
        for name in names:
            field = model.model_fields[name]
            default = field.get_default(call_default_factory=True)
            unset = inspect.Parameter.empty if field.is_required() else default
            own.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=unset, annotation=field.annotation
                )
            )
        vars(function)["__signature__"] = written.replace(parameters=own)
        lines = [f"- `{name}`: {help_line(model, name)}" for name in names]
        head = f"Options, as keywords or together as `options`, a `{model.__name__}`:"
        function.__doc__ = "\n\n".join([inspect.cleandoc(function.__doc__ or ""), head, "\n".join(lines)])
        return function

    return show
