// What a client, a call and a generation are told.
#pragma once

#include <grpcpp/support/channel_arguments.h>

#include <chrono>
#include <functional>
#include <optional>
#include <string>

namespace hotgraph {

// Where the daemon listens when it is told nothing.
inline constexpr const char* kDefaultTarget = "unix:hotgraph.sock";

// How long a call may take in all; absent: as long as the server lets it.
using Timeout = std::optional<std::chrono::nanoseconds>;

// PEM text. Without root certificates the system's are trusted; chain and key (both or none) are for mutual TLS.
struct Tls {
    std::string root_certificates;
    std::string certificate_chain;
    std::string private_key;
    std::string server_name;  // in the server's certificate, when the target has another

    // The same, read from PEM files; an empty path is a part that is not there. Throws SetupError when one cannot be
    // read.
    static Tls from_files(const std::string& root_certificates, const std::string& certificate_chain = "",
                          const std::string& private_key = "");
};

// When a generation goes on with its answer after a lost server.
enum class Resume {
    repeatable,  // greedy requests and those with a seed, and any other before its first token
    always,      // also with the seed that the server drew
    never,       // only what gRPC tries again by itself
};

// How far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at random.
struct ResumePolicy {
    // Servers lost in the middle of one generation, or before its first event; bounds what a request that kills servers
    // can do.
    int max_losses = 3;
    int max_attempts = 8;  // tries in a row to reach a server again, each of them with gRPC's own retries
    std::chrono::nanoseconds first_backoff = std::chrono::milliseconds(100);
    std::chrono::nanoseconds max_backoff = std::chrono::seconds(5);
    // A stream whose tokens pause for longer counts as lost, for paths on which keepalive does not reach the server
    // itself (a proxy answers it). Absent: never.
    std::optional<std::chrono::nanoseconds> idle;
};

struct ClientOptions {
    // Encrypts; plain text without.
    std::optional<Tls> tls;
    // Sends `authorization: bearer TOKEN` with every call. Over plain TCP to another host it is refused.
    std::optional<std::string> token;
    // Asked for the token before each call, by whatever thread makes it; wins over token.
    std::function<std::string()> token_source;
    // Lets a token go over plain TCP to another host, for a path that is safe by other means.
    bool allow_insecure_token = false;
    // Names the caller to the daemon: AdminService.ListClients shows it.
    std::string client_id;
    // How often gRPC sends a call that was not answered yet, 1 to 5 in all.
    int max_attempts = 4;
    // Lets calls wait for a server, up to their deadline, instead of failing at once when there is none.
    bool wait_for_ready = false;
    // Pings after so much silence during calls; a server that does not answer in time is dead.
    std::chrono::milliseconds keepalive = std::chrono::seconds(10);
    std::chrono::milliseconds keepalive_timeout = std::chrono::seconds(5);
    // Of generations that are told nothing else.
    Resume resume = Resume::repeatable;
    ResumePolicy resume_policy;
    // Sets options of gRPC's own; they win over ours.
    std::function<void(grpc::ChannelArguments&)> channel_arguments;
};

struct GenerateOptions {
    // How long it may take in all, beside GenerateRequest.timeout.
    Timeout timeout;
    // Instead of what the client was told.
    std::optional<Resume> resume;
    std::optional<ResumePolicy> resume_policy;
};

}  // namespace hotgraph
