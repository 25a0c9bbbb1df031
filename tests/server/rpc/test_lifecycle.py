"""The daemon's states, and which calls may pass in each."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import pytest

from hotgraph_server.errors import DrainingError, EngineFailedError, HotgraphError, LoadingError, ModelNotFoundError
from hotgraph_server.rpc import TRANSITIONS, DaemonState, Lifecycle, ServedModel


def lifecycle_in(state: DaemonState) -> Lifecycle:
    lifecycle = Lifecycle()
    if state is not DaemonState.STARTING:
        lifecycle.serve(served_model())
    if state in (DaemonState.DRAINING, DaemonState.STOPPED):
        lifecycle.move(DaemonState.DRAINING)
    if state is DaemonState.STOPPED:
        lifecycle.move(DaemonState.STOPPED)
    return lifecycle


def served_model() -> ServedModel:
    return ServedModel("tiny", engine=Mock(), tokenizer=Mock(), scheduler=Mock())


@pytest.mark.parametrize(("before", "after"), list(itertools.product(DaemonState, DaemonState)))
def test_every_pair_of_states_follows_the_table(before: DaemonState, after: DaemonState) -> None:
    """A transition of the table succeeds, any other raises and changes nothing."""
    lifecycle = lifecycle_in(before)
    assert lifecycle.state is before
    if after in TRANSITIONS[before]:
        lifecycle.move(after)
        assert lifecycle.state is after
    else:
        with pytest.raises(ValueError, match=f"{before.value} to {after.value}"):
            lifecycle.move(after)
        assert lifecycle.state is before


@pytest.mark.parametrize(
    ("state", "refusal"),
    [
        (DaemonState.STARTING, LoadingError),
        (DaemonState.SERVING, None),
        (DaemonState.DRAINING, DrainingError),
        (DaemonState.STOPPED, DrainingError),
    ],
)
def test_calls_pass_only_while_serving(state: DaemonState, refusal: type[HotgraphError] | None) -> None:
    """Each state refuses with its own retryable error."""
    lifecycle = lifecycle_in(state)
    if refusal is None:
        assert lifecycle.require().model_id == "tiny"
    else:
        with pytest.raises(refusal):
            lifecycle.require()


def test_failure_refuses_everything_and_the_first_counts() -> None:
    """After a failure calls get it, whatever comes later."""
    lifecycle = lifecycle_in(DaemonState.SERVING)
    first = EngineFailedError("first", retry_after_seconds=1)
    lifecycle.fail(first)
    lifecycle.fail(EngineFailedError("second", retry_after_seconds=1))
    with pytest.raises(EngineFailedError, match="first"):
        lifecycle.require()
    assert lifecycle.failure is first


@pytest.mark.parametrize("name", ["", "tiny", "models/tiny"])
def test_model_is_known_by_its_names(name: str) -> None:
    """Empty, the id and the resource name all mean the served model."""
    served_model().check_name(name)


@pytest.mark.parametrize("name", ["Tiny", "models/", "models/other", "tiny/", "models/models/tiny"])
def test_other_names_are_not_found(name: str) -> None:
    """Anything else is no model of this daemon."""
    with pytest.raises(ModelNotFoundError):
        served_model().check_name(name)
