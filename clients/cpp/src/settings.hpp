// What a client was told, as gRPC wants it: checks, arguments of the channel, credentials, metadata. It opens no
// connection.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <string>

#include "hotgraph/options.hpp"

namespace hotgraph {

// Throws SetupError for what cannot work or is not safe.
void check_options(const std::string& target, const ClientOptions& options);

grpc::ChannelArguments channel_arguments(const std::string& target, const ClientOptions& options);

std::shared_ptr<grpc::ChannelCredentials> channel_credentials(const ClientOptions& options);

// What every call carries. Throws RequestError for a token that no header may hold, and whatever the token's source
// throws.
void add_metadata(grpc::ClientContext& context, const ClientOptions& options, const std::string& session_key);

// gRPC's service config as JSON: which calls it tries again by itself.
std::string service_config(int max_attempts);

// The value of the metadata that a balancer hashes; a key that no header may hold goes as its SHA-256.
std::string session_id(const std::string& session_key);

}  // namespace hotgraph
