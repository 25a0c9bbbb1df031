"""Build hook: generates the Python stubs of `protos/` with grpcio-tools before the package is installed or built.

Also a script: `python hatch_build.py` regenerates them in place, which is what `make protos` runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent


def generate_stubs() -> None:
    """Writes *_pb2.py, *_pb2.pyi, *_pb2_grpc.py and *_pb2_grpc.pyi beside the protos. Raises RuntimeError when protoc fails."""
    import grpc_tools  # type: ignore[import-untyped]  # has no stubs
    from grpc_tools import protoc

    protos = sorted((ROOT / "protos").rglob("*.proto"))
    # protoc finds its plugins on PATH: those of this interpreter come first.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    out = str(ROOT / "protos")
    arguments = [
        "protoc",
        f"--proto_path={out}",
        f"--proto_path={well_known}",
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out=quiet:{out}",
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; its messages are above")


if __name__ == "__main__":
    generate_stubs()
else:  # loaded by hatchling, which need not be there when this is run as a script
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class CustomBuildHook(BuildHookInterface[Any]):
        """Hatchling's entry point."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Generates the stubs before files are collected."""
            generate_stubs()
