"""What can capture. Each is one file; a backend that needs a library imports it in its own file only."""

from graphcache.backends.eager import EagerBackend
from graphcache.backends.fake import FakeBackend, FakeProgram

__all__ = ["EagerBackend", "FakeBackend", "FakeProgram"]
