"""Reflection of a running daemon, asked on the wire in both versions: it knows every name of the contract, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_database import DescriptorDatabase
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from hotgraph.v1 import admin_service_pb2, graph_service_pb2, inference_service_pb2
from hotgraph_server.rpc.reflection import METHOD, REFLECTION_SERVICES, V1_SERVICE, SymbolPool
from hotgraph_server.rpc.server import HEALTH_SERVICE, OUR_SERVICES
from tests.integration.harness import PATIENCE_SECONDS, Serving, serving

ENTRIES = [admin_service_pb2.DESCRIPTOR, graph_service_pb2.DESCRIPTOR, inference_service_pb2.DESCRIPTOR]
Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse


async def ask(served: Serving, requests: list[Request], service: str = V1_SERVICE) -> list[Response]:
    """One answer for each, all on one stream."""

    async def sent() -> AsyncIterator[Request]:
        for request in requests:
            yield request

    dial = served.channel.stream_stream(f"/{service}/{METHOD}", Request.SerializeToString, Response.FromString)
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [response async for response in dial(sent())]


def files_of(response: Response) -> list[FileDescriptorProto]:
    return [FileDescriptorProto.FromString(data) for data in response.file_descriptor_response.file_descriptor_proto]


def names_of(file: FileDescriptor) -> Iterator[str]:
    """The full name of everything that the file declares."""
    for service in file.services_by_name.values():
        yield service.full_name
        yield from (method.full_name for method in service.methods)
    for enum in file.enum_types_by_name.values():
        yield from enum_names(enum, file.package)
    for message in file.message_types_by_name.values():
        yield from message_names(message)


def message_names(message: Descriptor) -> Iterator[str]:
    yield message.full_name
    yield from (field.full_name for field in message.fields)
    yield from (oneof.full_name for oneof in message.oneofs)
    for enum in message.enum_types:
        yield from enum_names(enum, message.full_name)
    for nested in message.nested_types:
        yield from message_names(nested)


def enum_names(enum: EnumDescriptor, scope: str) -> Iterator[str]:
    """Values are named beside their enum, not in it."""
    yield enum.full_name
    yield from (f"{scope}.{value.name}" for value in enum.values)


@pytest.mark.parametrize("service", REFLECTION_SERVICES)
async def test_every_name_of_the_contract_is_found(service: str) -> None:
    """Services, methods, messages, fields, oneofs, enums and their values each lead to the file that declares them."""
    wanted = {name: file.name for entry in ENTRIES for file in (entry, *ours_of(entry)) for name in names_of(file)}
    assert {
        "hotgraph.v1.InferenceService.Generate",
        "hotgraph.v1.GenerateRequest.prompt",
        "hotgraph.v1.GenerateRequest.max_tokens",
        "hotgraph.v1.GRAPH_STATE_READY",
    } <= set(wanted)
    async with serving() as served:
        answers = await ask(served, [Request(file_containing_symbol=name) for name in wanted], service)
    found = {answer.original_request.file_containing_symbol: files_of(answer) for answer in answers}
    assert {name: files[0].name if files else None for name, files in found.items()} == wanted


def ours_of(file: FileDescriptor) -> list[FileDescriptor]:
    return [dependency for dependency in file.dependencies if dependency.package == file.package]


async def test_names_that_are_not_there_are_not_found() -> None:
    """Also those that begin like a name that is there. The stream goes on after them."""
    names = [
        "hotgraph.v1.InferenceService.Nothing",
        "hotgraph.v1.InferenceService.Generate.more",
        "hotgraph.v1.GenerateRequest.nothing",
        "hotgraph.v1.GraphState.GRAPH_STATE_READY",
        "hotgraph.v1",
        "Generate",
        ".",
        "",
    ]
    async with serving() as served:
        *missing, there = await ask(served, [Request(file_containing_symbol=n) for n in (*names, OUR_SERVICES[0])])
    codes = [answer.error_response.error_code for answer in missing]
    assert codes == [grpc.StatusCode.NOT_FOUND.value[0]] * len(names)
    assert files_of(there)


async def test_both_versions_tell_of_each_other() -> None:
    """Each service that is listed can be described with the files that came, the two of reflection itself too."""
    async with serving() as served:
        for service in REFLECTION_SERVICES:
            [listed] = await ask(served, [Request(list_services="")], service)
            names = [entry.name for entry in listed.list_services_response.service]
            assert set(names) == {*OUR_SERVICES, HEALTH_SERVICE, *REFLECTION_SERVICES}
            for answer in await ask(served, [Request(file_containing_symbol=name) for name in names], service):
                came = DescriptorDatabase()
                for file in files_of(answer):
                    came.Add(file)
                pool = DescriptorPool(came)
                assert pool.FindServiceByName(answer.original_request.file_containing_symbol).methods


async def test_extensions_of_either_pool() -> None:
    """Asking for extensions of a message is answered, whichever pool has it: there are none."""
    types = ["hotgraph.v1.GenerateRequest", "grpc.reflection.v1.ErrorResponse"]
    numbers = [Request(all_extension_numbers_of_type=name) for name in types]
    extensions = [
        Request(file_containing_extension=reflection_pb2.ExtensionRequest(containing_type=name, extension_number=9))
        for name in types
    ]
    async with serving() as served:
        answers = await ask(served, [*numbers, *extensions])
    assert [answer.all_extension_numbers_response.base_type_name for answer in answers[:2]] == types
    assert [answer.error_response.error_code for answer in answers[2:]] == [grpc.StatusCode.NOT_FOUND.value[0]] * 2


async def test_the_librarys_client_builds_a_pool_of_it() -> None:
    """gRPC's own client of reflection finds a method's file and makes working descriptors of all that it needs."""

    def describe(target: str) -> str:
        with grpc.insecure_channel(target) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            name = database.FindFileContainingSymbol("hotgraph.v1.InferenceService.Generate").name
            file = DescriptorPool(database).FindFileByName(name)
            return file.services_by_name["InferenceService"].methods_by_name["Generate"].output_type.full_name

    async with serving() as served:
        found = await asyncio.wait_for(asyncio.to_thread(describe, served.daemon.addresses[0]), PATIENCE_SECONDS)
    assert found == "hotgraph.v1.GenerateResponse"


def test_the_process_pool_is_left_alone() -> None:
    """The newer service's file is not added to the pool that all libraries of a process share."""
    assert SymbolPool().FindFileContainingSymbol(V1_SERVICE).name == "grpc/reflection/v1/reflection.proto"
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileContainingSymbol(V1_SERVICE)
