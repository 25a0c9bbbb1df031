"""Groups of options that several commands share: a frozen dataclass is a group, its annotated fields are the options.

`with_groups` lets a command take a group as one parameter; Typer sees the group's options in its place. It knows nothing
of what the options mean.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as Typer shall see it: each parameter whose type is a dataclass is replaced by that dataclass's fields.

    Options of groups come after the command's own, in order. Raises TypeError when two options have one name.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    own: list[inspect.Parameter] = []
    grouped: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            grouped += _parameters(hint)
        else:
            own.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
    parameters = own + grouped
    names = [parameter.name for parameter in parameters]
    if len(set(names)) != len(names):
        raise TypeError(f"options of {command.__name__} share a name: {sorted(names)}")

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            fields = [item.name for item in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    # Typer reads both: the signature for names and defaults, the annotations for types.
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del vars(run)["__wrapped__"]  # else the signature of the original would be found first
    return run


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=hints[item.name]
        )
        for item in dataclasses.fields(group)
    ]


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    return inspect.Parameter.empty if item.default_factory is dataclasses.MISSING else item.default_factory()
