"""A model's chat template: Jinja in a sandbox, with what templates of transformers may use. It knows no tokens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from hotgraph_server.errors import ModelLoadError

# What a template's own expressions can raise on values it did not expect.
_EXPRESSION_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatTemplateError(Exception):
    """The template does not take these messages; the text says why as far as the template itself says so."""


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Safe from any thread."""

    def __init__(self, source: str) -> None:
        """Raises ModelLoadError when it is no template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template is broken: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as one text. `special_tokens` are the template's bos_token and so on. Raises ChatTemplateError."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **special_tokens,
            )
        except _Refusal as error:
            raise ChatTemplateError(f"the model's chat template refuses them: {error.message}") from error
        except _EXPRESSION_ERRORS as error:
            raise ChatTemplateError("the model's chat template does not take them") from error


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)  # the local day is what templates tell the model


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
