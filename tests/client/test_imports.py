"""What importing the client brings along."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import hotgraph_client
# grpc_health, grpc_reflection and grpc_tools are not among them: grpc itself imports them where they are installed.
forbidden = {"torch", "transformers", "numpy", "pydantic", "hotgraph_server", "graphcache", "grpc_status", "uvloop",
             "typer", "rich"}
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(forbidden & loaded))
missing = [name for name in hotgraph_client.__all__ if not hasattr(hotgraph_client, name)]
print(missing)
"""


def test_the_client_is_light() -> None:
    """Importing the client loads neither torch nor the server nor anything else of the heavier installs."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
