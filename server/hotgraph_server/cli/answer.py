"""Shows one generation: text as it is made, then what it took. Shared by generate, chat and demo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hotgraph_server.cli.output import console, jsonable, print_json_line, table, titled, write
from hotgraph_server.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from hotgraph_client.types import Completion, Event, Finished, Started


def event_json(event: Event) -> dict[str, Any]:
    """One event as an object: "event" is started, tokens or finished; the rest are the event's fields."""
    return {"event": type(event).__name__.lower(), **jsonable(event)}


def print_events(events: Iterable[Event]) -> None:
    """Every event as a line of JSON, when it comes."""
    for event in events:
        print_json_line(event_json(event))


def print_text(events: Iterable[Event], *, num_choices: int = 1) -> Answer:
    """The text on standard output as it comes; several choices one after the other, each under its number.

    Only the first unfinished choice is written as it comes; what others say meanwhile waits for its turn.
    """
    answer = Answer(num_choices)
    for event in events:
        answer.add(event)
        answer.write_new()
    answer.end()
    return answer


def print_completion(completion: Completion) -> Answer:
    """The same for an answer that came at once."""
    from hotgraph_client.types import ChoiceFinish, Finished, FinishReason, Started, Tokens

    answer = Answer(len(completion.choices))
    answer.add(Started(completion.request_id, completion.model, completion.usage.prompt_tokens, completion.seed))
    finishes = []
    for choice in completion.choices:
        finish = choice.finish or ChoiceFinish(choice.index, FinishReason.UNSPECIFIED)
        finishes.append(finish)
        answer.add(Tokens(choice.index, choice.token_ids, choice.text, choice.logprobs, finish))
    answer.add(
        Finished(tuple(finishes), completion.usage, completion.timings, completion.receipt, completion.num_resumes)
    )
    answer.write_new()
    answer.end()
    return answer


class Answer:
    """What came of one generation so far, and how much of it was written."""

    def __init__(self, num_choices: int = 1) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self._texts = [""] * num_choices
        self._ended = [False] * num_choices
        self._current = 0
        self._num_written = 0
        self._last_written = ""

    @property
    def text(self) -> str:
        """The text of the first choice so far."""
        return self._texts[0]

    def add(self, event: Event) -> None:
        """Takes in one event; writes nothing."""
        from hotgraph_client.types import Finished, Started, Tokens

        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Tokens):
            self._texts[event.choice_index] += event.text
            self._ended[event.choice_index] |= event.finish is not None

    def write_new(self) -> None:
        """Writes what can be written now."""
        while self._current < len(self._texts):
            text = self._texts[self._current]
            if len(self._texts) > 1 and self._num_written == 0 and text:
                self._write(f"[{self._current + 1}] ")
            self._write(text[self._num_written :])
            self._num_written = len(text)
            if not self._ended[self._current]:
                return
            self._current += 1
            self._num_written = 0
            if self._current < len(self._texts):
                self._write("\n\n")

    def end(self) -> None:
        """Ends the last line, if one was begun."""
        if self._last_written and not self._last_written.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            write(text)
            self._last_written = text


def print_statistics(finished: Finished, started: Started | None, *, to: Console | None = None) -> None:
    """Timings and receipt as small tables, on standard error by default: standard output is the answer's."""
    to = console(stderr=True) if to is None else to
    to.print(_timings(finished, started))
    to.print(_receipt(finished))


def _timings(finished: Finished, started: Started | None) -> RenderableType:
    timings, usage = finished.timings, finished.usage
    rows = table(["what", "value", "meaning"], numbers=["value"])
    decode_rate = "-"
    if timings.time_per_output_token_seconds:
        decode_rate = f"{1 / timings.time_per_output_token_seconds:.1f}/s"
    cached = f", {usage.cached_prompt_tokens} of them cached" if usage.cached_prompt_tokens else ""
    rows.add_row("queue", format_seconds(timings.queue_seconds), "until its first step")
    rows.add_row("prefill", format_seconds(timings.prefill_seconds), f"{usage.prompt_tokens} prompt tokens{cached}")
    rows.add_row("TTFT", format_seconds(timings.time_to_first_token_seconds), "time to first token")
    rows.add_row(
        "TPOT", format_seconds(timings.time_per_output_token_seconds), f"time per output token: {decode_rate} a choice"
    )
    rows.add_row("decode", format_seconds(timings.decode_seconds), f"{usage.completion_tokens} completion tokens")
    rows.add_row("total", format_seconds(timings.total_seconds), _ending(finished))
    if finished.num_resumes:
        rows.add_row("resumes", str(finished.num_resumes), "the daemon was lost and found again")
    remark = "" if started is None else f"request {started.request_id}, model {started.model}, seed {started.seed}"
    return titled("Timings", rows, remark)


def _ending(finished: Finished) -> str:
    endings = []
    for choice in finished.choices:
        matched = ""
        if choice.stop_string is not None:
            matched = f" at {choice.stop_string!r}"
        elif choice.stop_token_id is not None:
            matched = f" token {choice.stop_token_id}"
        endings.append(f"{choice.reason.value}{matched}")
    return "ended by " + ", ".join(endings)


def _receipt(finished: Finished) -> RenderableType:
    receipt = finished.receipt
    rows = table(
        ["phase", "graph", "steps", "bucket", "padding", "engine", "age"], numbers=["steps", "padding", "engine", "age"]
    )
    for group in receipt.step_groups:
        bucket = f"{group.tokens_bucket or '?'} tokens, {group.rows_bucket or '?'} rows"
        rows.add_row(
            group.phase.value,
            group.graph.removeprefix("graphs/") if group.graph else "eager",
            str(group.num_steps),
            bucket,
            str(group.num_padding_tokens),
            format_seconds(group.engine_seconds),
            format_seconds(group.graph_age_seconds),
        )
    remark = f"{receipt.num_steps} steps: {receipt.num_graph_steps} by graph, {receipt.num_eager_steps} eager"
    if receipt.num_preemptions:
        remark += f"; pre-empted {receipt.num_preemptions} times"
    return titled("Receipt", rows, remark)
