"""The unit files as they come with the package: systemd finds nothing to say of them, and little to fear."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hotgraph_server.systemd.installation import DROP_INS, UNITS, apply, plan_install, shipped

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, of the distribution's package systemd"
)

EXPOSURE_LIMITS = {None: 1.2, "credentials": 1.2, "lan": 1.5, "systemd-254": 1.2, "unix-only": 0.5}


def version() -> int:
    text = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"systemd (\d+)", text)
    assert found is not None, text
    return int(found[1])


def installed(folder: Path, drop_in: str | None) -> list[Path]:
    """The two units with the drop-in, installed for a hotgraph that is there."""
    program = folder / "opt" / "bin" / "hotgraph"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    apply(plan_install(prefix=folder / "opt", destdir=folder, drop_ins=() if drop_in is None else (drop_in,)))
    return [folder / "etc/systemd/system" / unit for unit in UNITS]


def instance(path: Path) -> str:
    return str(path).replace("@.", "@0.")


@pytest.mark.parametrize("drop_in", [None, *DROP_INS])
def test_verify_says_nothing(drop_in: str | None, tmp_path: Path) -> None:
    """Not one line: systemd ignores what it does not know, says so, and exits with 0."""
    needed = int(drop_in.rpartition("-")[2]) if drop_in is not None and drop_in[-1].isdecimal() else 0
    if version() < needed:
        pytest.skip(f"the drop-in is for systemd {needed} and later, this is {version()}")
    for path in installed(tmp_path, drop_in):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", instance(path)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_verify_would_say_something(tmp_path: Path) -> None:
    """The check above can fail: a setting that does not exist is told, though the exit status is 0."""
    unit = installed(tmp_path, None)[0]
    unit.write_text(unit.read_text().replace("UMask=", "UMusk="))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert "UMusk" in done.stderr


@pytest.mark.parametrize("drop_in", [None, *DROP_INS])
def test_exposure(drop_in: str | None, tmp_path: Path) -> None:
    """What `systemd-analyze security` makes of it stays below the limits of each way to run."""
    for path in installed(tmp_path, drop_in):
        limit = EXPOSURE_LIMITS[drop_in]
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", f"--threshold={round(10 * limit)}", instance(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
        assert found is not None, done.stdout + done.stderr
        assert float(found[1]) <= limit, done.stdout
        assert done.returncode == 0


def test_the_two_units_differ_by_their_instance_only() -> None:
    """What one of them says of the sandbox, of restarts and of time, the other says too."""
    single, template = ([line for line in shipped(unit).splitlines() if not line.startswith("#")] for unit in UNITS)
    only_template = ("CUDA_VISIBLE_DEVICES=", "EnvironmentFile=-/etc/hotgraph/hotgraph-%i.env")
    expected = [line for line in template if not any(text in line for text in only_template)]
    assert single == [line.replace(", on GPU %i", "").replace("/%i", "").replace("-%i", "") for line in expected]
