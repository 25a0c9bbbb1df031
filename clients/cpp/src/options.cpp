#include "hotgraph/options.hpp"

#include <algorithm>
#include <fstream>
#include <sstream>

#include "hotgraph/error.hpp"
#include "settings.hpp"
#include "sha256.hpp"
#include "target.hpp"

namespace hotgraph {
namespace {

constexpr int kMaxReceiveBytes =
    64 << 20;                    // a long completion with log-probabilities is larger than gRPC's default of 4 MiB
constexpr int kMaxAttempts = 5;  // gRPC takes no more
constexpr const char* kCertificate = "-----BEGIN CERTIFICATE-----";

// What a header may hold. gRPC ends the process for anything else.
bool is_printable(const std::string& text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

std::string read_file(const std::string& path) {
    if (path.empty()) return "";
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (!file || !(text << file.rdbuf())) throw SetupError(path + ": cannot be read, or is empty");
    return text.str();
}

void check_tls(const Tls& tls) {
    if (tls.certificate_chain.empty() != tls.private_key.empty()) {
        throw SetupError("mutual TLS needs both a certificate chain and a private key");
    }
    for (const std::string* pem : {&tls.root_certificates, &tls.certificate_chain}) {
        if (!pem->empty() && pem->find(kCertificate) == std::string::npos) {
            throw SetupError("the PEM text of TLS holds no certificate");
        }
    }
}

}  // namespace

Tls Tls::from_files(const std::string& root_certificates, const std::string& certificate_chain,
                    const std::string& private_key) {
    Tls tls;
    tls.root_certificates = read_file(root_certificates);
    tls.certificate_chain = read_file(certificate_chain);
    tls.private_key = read_file(private_key);
    check_tls(tls);
    return tls;
}

void check_options(const std::string& target, const ClientOptions& options) {
    if (target.empty()) throw SetupError("the target is empty");
    if (options.max_attempts < 1 || options.max_attempts > kMaxAttempts) {
        throw SetupError("max_attempts must be 1 to " + std::to_string(kMaxAttempts) + ", not " +
                         std::to_string(options.max_attempts));
    }
    if (options.keepalive.count() <= 0 || options.keepalive_timeout.count() <= 0) {
        throw SetupError("keepalive and its timeout must be positive");
    }
    if (options.tls) check_tls(*options.tls);
    const bool has_token = options.token || options.token_source;
    if (has_token && !options.tls && !options.allow_insecure_token && !is_local(target)) {
        throw SetupError("a token would go to " + target +
                         " in plain text: use tls, or allow_insecure_token when the path is safe");
    }
    if (!is_printable(options.token.value_or(""))) throw SetupError("the token has characters that no header may hold");
    if (!is_printable(options.client_id)) throw SetupError("the client id has characters that no header may hold");
}

grpc::ChannelArguments channel_arguments(const std::string& target, const ClientOptions& options) {
    const int keepalive_ms = static_cast<int>(options.keepalive.count());
    const int timeout_ms = static_cast<int>(options.keepalive_timeout.count());
    grpc::ChannelArguments arguments;
    arguments.SetUserAgentPrefix("hotgraph-cpp/" HOTGRAPH_VERSION);
    arguments.SetServiceConfigJSON(service_config(options.max_attempts));
    // A connection of its own: gRPC would share those of like channels.
    arguments.SetInt("grpc.use_local_subchannel_pool", 1);
    arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
    // A dead server shows after keepalive + timeout, however quiet the call: the ping's own timer is the second option,
    // the third alone does not end a connection whose peer still acknowledges TCP.
    arguments.SetInt("grpc.keepalive_time_ms", keepalive_ms);
    arguments.SetInt("grpc.http2.ping_timeout_ms", timeout_ms);
    arguments.SetInt("grpc.keepalive_timeout_ms", timeout_ms);
    arguments.SetInt("grpc.http2.max_pings_without_data", 0);  // a long prefill sends nothing for many pings
    arguments.SetInt("grpc.keepalive_permit_without_calls", 0);
    // A restarted daemon is found again soon.
    arguments.SetInt("grpc.initial_reconnect_backoff_ms", 100);
    arguments.SetInt("grpc.max_reconnect_backoff_ms", 2000);
    if (is_local(target)) arguments.SetInt("grpc.enable_http_proxy", 0);
    if (options.tls && !options.tls->server_name.empty()) {
        arguments.SetSslTargetNameOverride(options.tls->server_name);
    }
    if (options.channel_arguments) options.channel_arguments(arguments);
    return arguments;
}

std::shared_ptr<grpc::ChannelCredentials> channel_credentials(const ClientOptions& options) {
    if (!options.tls) return grpc::InsecureChannelCredentials();
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = options.tls->root_certificates;
    ssl.pem_cert_chain = options.tls->certificate_chain;
    ssl.pem_private_key = options.tls->private_key;
    return grpc::SslCredentials(ssl);
}

void add_metadata(grpc::ClientContext& context, const ClientOptions& options, const std::string& session_key) {
    if (options.token_source || options.token) {
        const std::string token = options.token_source ? options.token_source() : *options.token;
        if (!is_printable(token)) {
            Failure failure;
            failure.code = grpc::StatusCode::UNAUTHENTICATED;
            failure.message = "the token has characters that no header may hold";
            throw RequestError(std::move(failure));
        }
        context.AddMetadata("authorization", "bearer " + token);
    }
    if (!options.client_id.empty()) context.AddMetadata("x-client-id", options.client_id);
    if (!session_key.empty()) context.AddMetadata("session_id", session_id(session_key));
}

// UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, up to max_attempts in all, as long as nothing was answered. gRPC
// waits as long as the server's push-back says, else 0.1 s, 0.2 s, 0.4 s with jitter. Throttling: each failure takes
// one of 20 tokens and each success gives back a fifth of one; at half or less nothing is tried again. EvictGraph is
// never tried again: a second time it would fail although the first one worked.
std::string service_config(int max_attempts) {
    std::string policy;
    if (max_attempts > 1) {  // gRPC refuses a policy of one attempt
        policy = R"(, "retryPolicy": {"maxAttempts": )" + std::to_string(max_attempts) +
                 R"(, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,)"
                 R"( "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]})";
    }
    return R"({"methodConfig": [{"name": [{}])" + policy +
           R"(}, {"name": [{"service": "hotgraph.v1.GraphService", "method": "EvictGraph"}]}],)"
           R"( "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2}})";
}

std::string session_id(const std::string& session_key) {
    const bool is_trimmed = !session_key.empty() && session_key.front() != ' ' && session_key.back() != ' ';
    return is_trimmed && is_printable(session_key) ? session_key : sha256_hex(session_key);
}

}  // namespace hotgraph
