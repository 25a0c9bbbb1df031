"""A deterministic generation for tests: token id n is byte n of a given text, with text held back as the contract says.

It answers a request, resumed or not, with the messages a daemon would send, in chunks of the sizes it is told.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

from hotgraph.v1 import generation_pb2
from hotgraph.v1.inference_service_pb2 import GenerateRequest, GenerateResponse

SEED = 4711
MODEL = "scripted"
PROMPT_TOKENS = 5


class TextMachine:
    """Bytes to text: whole characters only, held back while they may begin a stop string."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, token_id: int) -> str:
        """The text that became certain with a token."""
        self._held += self._decoder.decode(bytes([token_id]))
        for stop_string in self._stop_strings:
            if stop_string in self._held:
                self.matched = stop_string
                return self._held[: self._held.index(stop_string)]
        num_open = max(
            (n for s in self._stop_strings for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0
        )
        text, self._held = self._held[: len(self._held) - num_open], self._held[len(self._held) - num_open :]
        return text

    def flush(self) -> str:
        """What is left at the end."""
        return self._held + self._decoder.decode(b"", final=True)


class _Choice:
    """One choice under way."""

    def __init__(self, index: int, ids: Sequence[int], request: GenerateRequest, resumed: Sequence[int]) -> None:
        self.index = index
        self.ids = ids
        self.num_done = 0
        self.machine = TextMachine(request.stop.strings)
        self.finish: generation_pb2.ChoiceFinish | None = None
        for token_id in resumed:
            if token_id != ids[self.num_done]:
                raise AssertionError(f"choice {index} resumes with other tokens than were sent")
            self._step()

    def _step(self) -> str:
        text = self.machine.push(self.ids[self.num_done])
        self.num_done += 1
        if self.machine.matched is not None:
            self.finish = generation_pb2.ChoiceFinish(
                choice_index=self.index, reason=generation_pb2.FINISH_REASON_STOP, stop_string=self.machine.matched
            )
        elif self.num_done == len(self.ids):
            text += self.machine.flush()
            self.finish = generation_pb2.ChoiceFinish(
                choice_index=self.index, reason=generation_pb2.FINISH_REASON_LENGTH
            )
        return text

    def tokens(self, size: int) -> generation_pb2.Tokens:
        """The next event, of at most this many tokens."""
        ids: list[int] = []
        text = ""
        while len(ids) < size and self.finish is None:
            ids.append(self.ids[self.num_done])
            text += self._step()
        logprobs = [
            generation_pb2.TokenLogprobs(
                chosen=generation_pb2.TokenLogprob(token_id=i, logprob=-i / 1000, piece=bytes([i]))
            )
            for i in ids
        ]
        return generation_pb2.Tokens(
            choice_index=self.index, token_ids=ids, text=text, logprobs=logprobs, finish=self.finish
        )


def started(request: GenerateRequest) -> GenerateResponse:
    seed = request.sampling.seed if request.sampling.HasField("seed") else SEED
    request_id = request.request_id or "made-by-server"
    return GenerateResponse(
        started=generation_pb2.Started(request_id=request_id, model=MODEL, prompt_tokens=PROMPT_TOKENS, seed=seed)
    )


def messages(request: GenerateRequest, texts: Sequence[str], sizes: Iterator[int]) -> Iterator[GenerateResponse]:
    """All messages of one call that generates these texts, one a choice, in turns."""
    yield started(request)
    resumed = {choice.index: choice.token_ids for choice in request.resume}
    indices = sorted(resumed) if resumed else range(len(texts))
    choices = [_Choice(i, texts[i].encode(), request, resumed.get(i, ())) for i in indices]
    has_more = True
    sent_finish = set[int]()
    while has_more:
        has_more = False
        for choice in choices:
            if choice.index not in sent_finish:
                tokens = choice.tokens(next(sizes))
                yield GenerateResponse(tokens=tokens)
                if tokens.HasField("finish"):
                    sent_finish.add(choice.index)
                has_more = True
    finished = generation_pb2.Finished(
        choices=[choice.finish for choice in choices if choice.finish],
        usage=generation_pb2.Usage(
            prompt_tokens=PROMPT_TOKENS, completion_tokens=sum(choice.num_done for choice in choices)
        ),
        receipt=generation_pb2.Receipt(num_steps=7, num_eager_steps=7),
    )
    finished.timings.total.FromMilliseconds(250)
    yield GenerateResponse(finished=finished)
