"""`hotgraph graphs` against a daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from hotgraph_client.graph_types import GraphKey, GraphState, SamplerVariant
from hotgraph_server.cli.graphs import STATES, key_text, parse_key
from tests.server.cli.conftest import COMMAND, FakeDaemon, Run, clean_environment

GRAPH_KEYS = {
    *("name", "key", "state", "size_bytes", "num_hits", "num_misses", "num_failures", "failure", "retry_time"),
    *("create_time", "publish_time", "last_hit_time", "capture", "eager_step_seconds", "graph_step_seconds"),
    *("segment", "pin_expire_time"),
}


@pytest.fixture
def graph(ask: Run) -> str:
    """The name of a graph that is ready."""
    ran = ask("graphs", "prewarm", "t4-r4-gumbel", "--wait", "10s", "--json")
    (found,) = ran.json["graphs"]
    assert found["state"] == "ready", ran
    return str(found["name"])


def test_names_and_keys() -> None:
    """A name reads as the key it writes, with or without its folder."""
    key = GraphKey(8, 4, SamplerVariant.FILTERED)
    assert parse_key(key_text(key)) == key
    assert parse_key("graphs/t8-r4-filtered") == key


def test_states_are_those_of_the_client() -> None:
    """The states offered are all that there are."""
    assert set(STATES) == {state.value for state in GraphState} - {"unspecified"}


def test_list(ask: Run, graph: str) -> None:
    """Graphs are listed as a table and as objects with the documented keys, and states filter."""
    ran = ask("graphs", "list")
    assert ran.status == 0
    assert graph.removeprefix("graphs/") in ran.stdout
    listed = ask("graphs", "list", "--state", "ready", "--json").json
    assert listed.keys() == {"graphs"}
    assert graph in [entry["name"] for entry in listed["graphs"]]
    assert all(entry.keys() == GRAPH_KEYS and entry["state"] == "ready" for entry in listed["graphs"])
    assert graph not in [entry["name"] for entry in ask("graphs", "list", "-s", "failed", "--json").json["graphs"]]


def test_get(ask: Run, graph: str) -> None:
    """One graph is shown by its name, with or without the folder."""
    entry = ask("graphs", "get", graph, "--json").json
    assert entry.keys() == GRAPH_KEYS
    assert entry["key"] == {"tokens": 4, "rows": 4, "sampler": "gumbel"}
    assert "publish_time" in ask("graphs", "get", graph.removeprefix("graphs/")).stdout


def test_pin_evict_unpin(ask: Run, graph: str) -> None:
    """A pinned graph cannot be evicted, an unpinned one can, and an evicted one cannot again."""
    assert ask("graphs", "pin", graph, "--lease", "1min", "--json").json["pin_expire_time"] is not None
    refused = ask("graphs", "evict", graph)
    assert refused.status == 1
    assert "[NOT_POSSIBLE]" in refused.stderr
    assert "is not pinned" in ask("graphs", "unpin", graph).stderr
    assert ask("graphs", "evict", graph, "--json").json["state"] == "evicted"
    assert ask("graphs", "evict", graph).status == 1


def test_people_are_told_what_was_done(ask: Run, graph: str) -> None:
    """Without --json a change is told in a line."""
    assert "is pinned until" in ask("graphs", "pin", graph).stderr
    assert "is not pinned" in ask("graphs", "unpin", graph).stderr
    assert ask("graphs", "unpin", graph, "--json").json["pin_expire_time"] is None
    assert "is evicted" in ask("graphs", "evict", graph).stderr


def test_unknown_graph(ask: Run) -> None:
    """A graph that is not there is one line and exit status 1."""
    ran = ask("graphs", "get", "t999-r9-greedy")
    assert ran.status == 1
    assert "[GRAPH_NOT_FOUND]" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prewarm", "big"], "no shape: 'big'"),
        (["prewarm", "t1-r2-greedy"], "no shape"),
        (["prewarm"], "Missing argument"),
        (["list", "--state", "lost"], "--state is one of queued"),
        (["budget", "--limit", "much"], "--limit: not a size"),
        (["budget", "--stall", "long"], "not a time"),
        (["pin", "t1-r1-greedy", "--lease", "ever"], "not a time"),
        (["watch", "--after", "-1"], "--after"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, run: Run) -> None:
    """A wrong command line is told in words, with exit status 2."""
    ran = run("graphs", *arguments)
    assert ran.status == 2, ran
    assert message in ran.stderr


def test_budget(own_daemon: FakeDaemon, run: Run) -> None:
    """The budget is shown, and changed by what is given only."""
    target = ("--target", own_daemon.target)
    before = run("graphs", "budget", "--json", *target).json
    assert before.keys() == {"budget", "evicted_graphs"}
    after = run("graphs", "budget", "--limit", "3MiB", "--json", *target).json["budget"]
    assert after["limit_bytes"] == 3 << 20
    assert after["stall_budget_seconds"] == before["budget"]["stall_budget_seconds"]
    after = run("graphs", "budget", "--stall", "20ms", "--json", *target).json["budget"]
    assert (after["limit_bytes"], after["stall_budget_seconds"]) == (3 << 20, 0.02)
    assert "3.00 MiB" in run("graphs", "budget", *target).stdout


def test_watch(own_daemon: FakeDaemon, run: Run) -> None:
    """Events stream as lines while they happen; Ctrl-C ends the watch well."""
    target = ("--target", own_daemon.target)
    command = [*COMMAND, "graphs", "watch", "--after", "0", *target]
    watches = [
        subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        for more in ([], ["--json"])
    ]
    try:
        assert run("graphs", "prewarm", "t2-r2-greedy", "--wait", "10s", *target).status == 0
        for_people, for_programs = watches
        assert for_programs.stdout is not None
        assert for_people.stdout is not None
        types = []
        while "published" not in types:
            event = json.loads(for_programs.stdout.readline())
            assert event.keys() == {"sequence", "event_time", "type", "graph", "detail"}
            types.append(event["type"])
        assert types[0] == "planned"
        line = b""
        while b"published" not in line:
            line = for_people.stdout.readline()
        assert b"t2-r2-greedy" in line
        for watch in watches:
            watch.send_signal(signal.SIGINT)
            _, errors = watch.communicate(timeout=20)
            assert (watch.returncode, errors) == (0, b"")
    finally:
        for watch in watches:
            if watch.poll() is None:
                watch.kill()
            watch.wait()
            for stream in (watch.stdout, watch.stderr):
                if stream is not None:
                    stream.close()


def test_watch_of_events_that_are_gone(ask: Run) -> None:
    """Events from the future or too long ago are an error, not an endless wait."""
    ran = ask("graphs", "watch", "--after", "999999")
    assert ran.status == 1
    assert "[EVENTS_GONE]" in ran.stderr


def test_profile_round_trip(ask: Run, graph: str, tmp_path: Path) -> None:
    """An exported profile imports again: from the file, and from a pipe."""
    file = tmp_path / "hot.json"
    assert ask("generate", "hello", "-n", "20", "-g").status == 0
    ran = ask("graphs", "profile", "export", str(file))
    assert ran.status == 0, ran
    profile = json.loads(file.read_text(encoding="utf-8"))
    assert profile.keys() == {"format", "model", "create_time", "entries"}
    assert profile["model"] == "fake"
    assert profile["entries"]
    assert all(
        entry.keys() == {"key", "num_hits", "num_misses", "saved_seconds", "size_bytes"} for entry in profile["entries"]
    )
    assert json.loads(ask("graphs", "profile", "export").stdout)["entries"]
    result = ask("graphs", "profile", "import", str(file), "--json").json
    assert result.keys() == {"num_queued", "num_skipped"}
    assert sum(result.values()) == len(profile["entries"])
    piped = ask("graphs", "profile", "import", "-", stdin=file.read_text(encoding="utf-8"))
    assert piped.status == 0
    assert "captures queued" in piped.stderr


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1, "entries": [{"key": "big"}]}', '{"format": 2, "entries": []}']
)
def test_no_profile(text: str, ask: Run, tmp_path: Path) -> None:
    """A file that is no profile is one line and exit status 1."""
    file = tmp_path / "hot.json"
    file.write_text(text, encoding="utf-8")
    ran = ask("graphs", "profile", "import", str(file))
    assert ran.status == 1
    assert f"{file} is no profile" in ran.stderr


def test_profile_files_that_cannot_be_used(ask: Run, tmp_path: Path) -> None:
    """A profile that cannot be read or written is one line."""
    assert ask("graphs", "profile", "import", str(tmp_path / "absent")).status == 2
    ran = ask("graphs", "profile", "export", str(tmp_path / "no" / "such.json"))
    assert ran.status == 1
    assert "cannot be written" in ran.stderr


def test_profile_of_another_model(ask: Run, tmp_path: Path) -> None:
    """A profile of another model is refused, unless the caller says it is of this one."""
    file = tmp_path / "hot.json"
    file.write_text(json.dumps({"format": 1, "model": "other", "entries": []}), encoding="utf-8")
    refused = ask("graphs", "profile", "import", str(file))
    assert refused.status == 1
    assert os.linesep not in refused.stderr.rstrip()
    assert ask("graphs", "profile", "import", str(file), "--model", "fake").status == 0
