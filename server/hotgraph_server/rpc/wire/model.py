"""A model on the wire."""

from __future__ import annotations

from typing import Final

from hotgraph.v1 import model_pb2
from hotgraph_server.batch import EngineInfo
from hotgraph_server.config import BOUNDS
from hotgraph_server.rpc.wire.common import to_duration, to_timestamp
from hotgraph_server.text import Tokenizer

RUNNERS: Final = {"decoder": model_pb2.MODEL_RUNNER_DECODER, "bridge": model_pb2.MODEL_RUNNER_BRIDGE}


def model_message(
    model_id: str,
    info: EngineInfo,
    tokenizer: Tokenizer,
    *,
    default_max_tokens: int,
    max_request_seconds: float,
) -> model_pb2.Model:
    """With what one request may ask of it."""
    limits = model_pb2.ModelLimits(
        max_prompt_bytes=BOUNDS.max_prompt_bytes,
        default_max_tokens=default_max_tokens,
        max_choices=BOUNDS.max_choices,
        max_stop_strings=BOUNDS.max_stop_strings,
        max_stop_string_bytes=BOUNDS.max_stop_string_bytes,
        max_stop_token_ids=BOUNDS.max_stop_token_ids,
        max_logit_bias=BOUNDS.max_logit_bias,
        max_logprobs=BOUNDS.max_logprobs,
        max_request_duration=to_duration(max_request_seconds),
    )
    return model_pb2.Model(
        name=f"models/{model_id}",
        id=model_id,
        architecture=info.architecture,
        context_length=info.context_length,
        vocabulary_size=info.vocabulary_size,
        dtype=info.dtype,
        device=info.device,
        device_name=info.device_name,
        runner=RUNNERS[info.runner],
        num_parameters=info.num_parameters,
        weights_bytes=info.weights_bytes,
        chat_template=tokenizer.chat_template,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        bos_token_id=tokenizer.bos_token_id,
        limits=limits,
        load_time=to_timestamp(info.load_time),
        load_duration=to_duration(info.load_seconds),
    )
