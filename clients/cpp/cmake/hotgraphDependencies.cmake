# Finds gRPC and protobuf for the build and for programs that use the installed package: protobuf::libprotobuf and
# gRPC::grpc++. Their own CMake packages where they are, else CMake's FindProtobuf and pkg-config; targets that a program
# brings already are taken as they are.

if(NOT TARGET protobuf::libprotobuf)
  find_package(Protobuf CONFIG QUIET)
  if(NOT TARGET protobuf::libprotobuf)
    find_package(Protobuf QUIET REQUIRED)
  endif()
endif()

if(NOT TARGET gRPC::grpc++)
  find_package(gRPC CONFIG QUIET)
  if(NOT TARGET gRPC::grpc++)
    find_package(PkgConfig REQUIRED)
    pkg_check_modules(hotgraph_grpc REQUIRED IMPORTED_TARGET grpc++)
    add_library(gRPC::grpc++ INTERFACE IMPORTED)
    target_link_libraries(gRPC::grpc++ INTERFACE PkgConfig::hotgraph_grpc)
  endif()
endif()
