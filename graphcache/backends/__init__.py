"""What can capture. A backend that needs a library is imported from its own file only: `graphcache.backends.cuda`."""

from graphcache.backends.eager import EagerBackend
from graphcache.backends.fake import FakeBackend, FakeProgram

__all__ = ["EagerBackend", "FakeBackend", "FakeProgram"]
