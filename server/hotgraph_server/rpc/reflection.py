"""gRPC server reflection, v1alpha and v1: which services there are, and the files that describe them.

The answers are the library's own servicer's, out of a pool that finds more by name than the library's. It knows no servicer of
ours and no state of the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pool import Default, DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2

METHOD: Final = "ServerReflectionInfo"
# The library has the older service alone. The newer one has the same messages under other names, and is asked first by tools.
V1ALPHA_SERVICE: Final[str] = reflection.SERVICE_NAME
V1_SERVICE: Final = "grpc.reflection.v1.ServerReflection"
REFLECTION_SERVICES: Final = (V1ALPHA_SERVICE, V1_SERVICE)
Found = TypeVar("Found")
_V1ALPHA_PACKAGE: Final = V1ALPHA_SERVICE.rpartition(".")[0]
_V1_PACKAGE: Final = V1_SERVICE.rpartition(".")[0]


def add_reflection(server: Any, service_names: Iterable[str]) -> None:
    """Has the server tell of these services and of reflection itself. `server`: what takes generic handlers."""
    # The guard wraps no blocking handlers, so it is the one for asyncio.
    servicer: Any = reflection.aio.ReflectionServicer((*service_names, *REFLECTION_SERVICES), pool=SymbolPool())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {METHOD: handler}) for name in REFLECTION_SERVICES)
    )


class SymbolPool:
    """What reflection looks things up in: all that this process knows of protobuf, and the newer reflection service.

    A symbol is the full name of a service, method, message, field, oneof, enum, enum value or extension. Each lookup raises
    KeyError for what is not there.
    """

    def __init__(self) -> None:
        self._known = Default()
        self._v1 = _v1_pool()

    def FindFileByName(self, name: str) -> FileDescriptor:  # noqa: N802  # protobuf's name, as the others
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802
        try:
            return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))
        except KeyError:
            # The library's pool finds the members of messages and enums by name, but not a service's methods.
            return self._first(lambda pool: pool.FindMethodByName(symbol)).containing_service.file

    def FindMessageTypeByName(self, name: str) -> Descriptor:  # noqa: N802
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Descriptor, number: int) -> FieldDescriptor:  # noqa: N802
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Descriptor) -> list[FieldDescriptor]:  # noqa: N802
        return message.file.pool.FindAllExtensions(message)

    def _first(self, find: Callable[[DescriptorPool], Found]) -> Found:
        try:
            return find(self._known)
        except KeyError:
            return find(self._v1)


def _v1_pool() -> DescriptorPool:
    """The file of the newer service, out of the older one's: they differ in the package alone.

    In a pool of its own, since another library of this process may bring that file along.
    """
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text_format.Parse(str(file).replace(_V1ALPHA_PACKAGE, _V1_PACKAGE), newer := descriptor_pb2.FileDescriptorProto())
    newer.name = "grpc/reflection/v1/reflection.proto"
    pool = DescriptorPool()
    pool.Add(newer)
    return pool
