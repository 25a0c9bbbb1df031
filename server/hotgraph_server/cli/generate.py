"""`hotgraph generate` and `hotgraph tokenize`: one request, text or tokens out."""

from __future__ import annotations

from typing import Annotated

import typer

from hotgraph_server.cli.connection import ConnectionOptions, JsonFlag
from hotgraph_server.cli.options import with_groups
from hotgraph_server.cli.output import console, print_json, safe, table, titled
from hotgraph_server.cli.request_options import PromptOptions, SamplingOptions, parse_ids


@with_groups
def generate(
    *,
    prompt: PromptOptions,
    stats: Annotated[
        bool, typer.Option("--stats", "-s", help="Timings and receipt afterwards.", rich_help_panel="Output")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it is made.", rich_help_panel="Output")
    ] = True,
    as_json: JsonFlag = False,
    sampling: SamplingOptions,
    connection: ConnectionOptions,
) -> None:
    """Continue a text or answer a question, once.

    The text goes to standard output as it is made, statistics to standard error. With --json every event is a line:
    "event" is started, tokens or finished; with --no-stream as well, one object holds the whole completion.
    """
    from hotgraph_server.cli.answer import print_completion, print_events, print_statistics, print_text

    arguments = sampling.arguments()
    what = prompt.read()
    with connection.client() as client:
        if not stream:
            completion = client.complete(what, **arguments)
            if as_json:
                print_json(completion)
                return
            answer = print_completion(completion)
        else:
            with client.generate(what, **arguments) as generation:
                if as_json:
                    print_events(generation)
                    return
                answer = print_text(generation, num_choices=sampling.choices or 1)
    if stats and answer.finished is not None:
        print_statistics(answer.finished, answer.started)


@with_groups
def tokenize(
    *,
    prompt: PromptOptions,
    decode: Annotated[
        bool, typer.Option("--decode", "-d", help="The other way: token ids to text.", rich_help_panel="Prompt")
    ] = False,
    special: Annotated[
        bool,
        typer.Option(
            "--special/--no-special", help="Add special tokens, or with --decode show them.", rich_help_panel="Prompt"
        ),
    ] = True,
    count: Annotated[
        bool, typer.Option("--count", help="Only say how many tokens there are.", rich_help_panel="Output")
    ] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="Default: the served one.", show_default=False)] = "",
    as_json: JsonFlag = False,
    connection: ConnectionOptions,
) -> None:
    """Show the tokens of a text or conversation, as generate would see them.

    Keys of --json: token_ids, pieces, context_length; with --decode: text.
    """
    if decode:
        ids = parse_ids(prompt.text())
        with connection.client() as client:
            text = client.detokenize(ids, model=model, skip_special_tokens=not special)
        if as_json:
            print_json({"text": text})
        else:
            console().print(safe(text), markup=False, soft_wrap=True)
        return
    words = prompt.read_words()
    with connection.client() as client:
        tokens = client.tokenize(words, model=model, add_special_tokens=special)
    if as_json:
        print_json(tokens)
        return
    summary = f"{len(tokens.token_ids)} tokens; the context holds {tokens.context_length}"
    if count:
        console().print(len(tokens.token_ids))
        return
    rows = table(["position", "id", "piece"], numbers=["position", "id"])
    for position, (token_id, piece) in enumerate(zip(tokens.token_ids, tokens.pieces, strict=True)):
        rows.add_row(str(position), str(token_id), _visible(piece))
    console().print(titled(summary, rows))


def _visible(piece: bytes) -> str:
    """The piece as text with what cannot be seen escaped; never taken as markup."""
    from rich.markup import escape

    text = piece.decode(errors="backslashreplace")
    return escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace(" ", "␣"))
