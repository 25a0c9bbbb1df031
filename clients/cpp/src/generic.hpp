// Messages as the bytes that gRPC's generic stub takes and gives.
#pragma once

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <string>
#include <vector>

#include "hotgraph/error.hpp"
#include "progress.hpp"

namespace hotgraph {

inline grpc::ByteBuffer packed(const google::protobuf::MessageLite& message) {
    const grpc::Slice bytes(message.SerializeAsString());
    return grpc::ByteBuffer(&bytes, 1);
}

// Throws InternalError for bytes that are no such message.
inline void unpack(const grpc::ByteBuffer& bytes, google::protobuf::MessageLite& message) {
    std::vector<grpc::Slice> slices;
    std::string joined;
    bool is_good = bytes.Dump(&slices).ok();
    for (const grpc::Slice& slice : slices) joined.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
    is_good = is_good && message.ParseFromString(joined);
    if (!is_good)
        throw InternalError(own_failure(grpc::StatusCode::INTERNAL, "the answer is no " + message.GetTypeName()));
}

}  // namespace hotgraph
