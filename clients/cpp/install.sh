#!/usr/bin/env bash
# Says what is missing to build the C++ client, and installs it with apt where one is root (or INSTALL=sudo). Debian 12, Ubuntu
# 24.04 and newer have all of it; elsewhere the same packages of any other manager do, or gRPC built from source.
set -euo pipefail

packages=()
missing() { packages+=("$@"); }
command -v cmake >/dev/null || missing cmake
command -v c++ >/dev/null || missing g++
command -v protoc >/dev/null || missing protobuf-compiler
command -v grpc_cpp_plugin >/dev/null || missing protobuf-compiler-grpc
command -v pkg-config >/dev/null || missing pkg-config
has_header() { echo "#include <$1>" | c++ -std=c++17 -E -x c++ - >/dev/null 2>&1; }
if command -v c++ >/dev/null; then
    has_header google/protobuf/message.h || missing libprotobuf-dev
    has_header grpcpp/grpcpp.h || missing libgrpc++-dev
    has_header gtest/gtest.h || missing libgtest-dev
else
    missing libprotobuf-dev libgrpc++-dev libgtest-dev
fi
[ ${#packages[@]} -eq 0 ] && exit 0

install=(apt-get install --yes --no-install-recommends "${packages[@]}")
if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || [ -n "${INSTALL:-}" ]; }; then
    ${INSTALL:-} "${install[@]}" >&2
else
    echo "the C++ client needs: ${INSTALL:-sudo} ${install[*]}" >&2
    exit 1
fi
