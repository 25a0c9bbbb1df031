"""What an executable holds of device memory, as well as it can be known. It knows numbers only.

Nothing tells it: the driver takes memory for executables in steps of 2 MiB, several small ones to a step, and others take
and give back memory meanwhile. So the fall of free memory around an instantiate, less what torch itself took, is believed
as it is only where it is many steps large. Else it counts for what it is on average: bytes that fell over nodes that were
instantiated, over all instantiates, those that moved nothing included.
"""

from __future__ import annotations

STEP_BYTES = 2 << 20
NUM_STEPS_BELIEVED = 8  # a fall of so many steps is right to about an eighth
MAX_NODE_BYTES = 256 << 10  # more than that for each node, and a step for rounding, was somebody else's doing
ASSUMED_NODE_BYTES = 8 << 10  # before anything was measured: seen were 3 to 170 KiB
ASSUMED_NUM_NODES = 256  # that the assumption counts for


class ExecutableSizes:
    """A running account of what instantiates took."""

    def __init__(self) -> None:
        self._num_bytes = ASSUMED_NODE_BYTES * ASSUMED_NUM_NODES
        self._num_nodes = ASSUMED_NUM_NODES

    def __repr__(self) -> str:
        return f"ExecutableSizes({self.node_bytes:.0f} bytes a node)"

    @property
    def node_bytes(self) -> float:
        """The mean so far."""
        return self._num_bytes / self._num_nodes

    def measured(self, num_nodes: int, fallen_bytes: int) -> int:
        """Takes in one instantiate, around which free memory fell by so much (rose, if negative); returns its bytes."""
        is_plausible = 0 <= fallen_bytes <= num_nodes * MAX_NODE_BYTES + STEP_BYTES
        if is_plausible:
            self._num_bytes += fallen_bytes
            self._num_nodes += num_nodes
            if fallen_bytes >= NUM_STEPS_BELIEVED * STEP_BYTES:
                return fallen_bytes
        return round(self.node_bytes * num_nodes)
