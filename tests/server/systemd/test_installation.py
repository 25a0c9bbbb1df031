"""Installing and removing unit files: what is shown is what is done, and what operators wrote is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotgraph_server.settings import load_settings
from hotgraph_server.systemd.installation import (
    DROP_INS,
    SHIPPED_PREFIX,
    UNITS,
    Action,
    Change,
    apply,
    plan_install,
    plan_uninstall,
    shipped,
)


def install(folder: Path, prefix: str = SHIPPED_PREFIX, drop_ins: tuple[str, ...] = ()) -> list[Change]:
    changes = plan_install(prefix=Path(prefix), destdir=folder, drop_ins=drop_ins)
    apply(changes)
    return changes


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def actions(changes: list[Change]) -> set[Action]:
    return {change.action for change in changes}


def test_planning_writes_nothing(tmp_path: Path) -> None:
    """A plan shows every file as a diff and touches none."""
    changes = plan_install(prefix=Path("/usr"), destdir=tmp_path, drop_ins=DROP_INS)
    assert all(change.diff.startswith("--- /dev/null") for change in changes)
    assert list(tmp_path.iterdir()) == []


def test_install_and_uninstall(tmp_path: Path) -> None:
    """An install writes the units for that hotgraph, a second one changes nothing, and an uninstall leaves no file."""
    install(tmp_path, "/usr/local", DROP_INS)
    files = tree(tmp_path)
    for unit in UNITS:
        assert "ExecStart=/usr/local/bin/hotgraph serve" in files[f"etc/systemd/system/{unit}"]
        assert SHIPPED_PREFIX not in "".join(files.values())
        assert {f"etc/systemd/system/{unit}.d/50-{name}.conf" for name in DROP_INS} <= files.keys()
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in files)
    assert actions(install(tmp_path, "/usr/local", DROP_INS)) == {Action.KEEP}
    assert tree(tmp_path) == files
    apply(plan_uninstall(destdir=tmp_path))
    assert tree(tmp_path) == {}
    assert not (tmp_path / "etc/hotgraph").exists()
    assert plan_uninstall(destdir=tmp_path) == []


def test_what_an_operator_wrote(tmp_path: Path) -> None:
    """Settings are never written over; a unit that was changed is shown as a diff; neither is removed."""
    install(tmp_path)
    settings, unit = tmp_path / "etc/hotgraph/hotgraph.toml", tmp_path / "etc/systemd/system/hotgraph.service"
    settings.write_text("# mine\n")
    unit.write_text(unit.read_text().replace("RestartSec=1", "RestartSec=9"))
    changes = {change.path: change for change in plan_install(prefix=Path(SHIPPED_PREFIX), destdir=tmp_path)}
    assert changes[settings].action is Action.KEEP
    assert changes[unit].action is Action.REPLACE
    assert "-RestartSec=9\n+RestartSec=1\n" in changes[unit].diff
    apply(plan_uninstall(destdir=tmp_path))
    assert set(tree(tmp_path)) == {"etc/hotgraph/hotgraph.toml", "etc/systemd/system/hotgraph.service"}


def test_unknown_drop_in(tmp_path: Path) -> None:
    """It is refused by name, before anything is written."""
    with pytest.raises(ValueError, match=r"'wan'.*unix-only"):
        plan_install(prefix=Path("/usr"), destdir=tmp_path, drop_ins=("wan",))


def test_shipped_settings_are_settings(tmp_path: Path) -> None:
    """The example is read without a complaint, and so are the variables that the units set."""
    file = tmp_path / "hotgraph.toml"
    file.write_text(shipped("hotgraph.toml"))
    environment: dict[str, str] = {}
    for unit in UNITS:
        for line in shipped(unit).splitlines():
            if line.startswith("Environment="):
                pairs = line.removeprefix("Environment=").split()
                environment |= dict(pair.split("=", 1) for pair in pairs)
    settings = load_settings(environment=environment, file=file).settings
    assert settings.server.listen == ("unix:/run/hotgraph-%i/hotgraph.sock",)
    assert settings.server.socket_access == "group"
