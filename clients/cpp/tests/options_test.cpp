// What a client takes and refuses, without any connection.

#include "hotgraph/options.hpp"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>

#include <fstream>

#include "hotgraph/client.hpp"
#include "report.hpp"
#include "settings.hpp"
#include "sha256.hpp"
#include "target.hpp"

namespace hotgraph {
namespace {

using namespace std::chrono_literals;

// A target is local when all of its addresses are.
TEST(Target, IsJudgedByAllItsAddresses) {
    for (const std::string target :
         {"unix:s", "unix:///tmp/s", "unix-abstract:s", "localhost:1", "127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "::1",
          "dns:///localhost:1", "ipv4:127.0.0.1:1,127.0.0.2:1", "ipv6:[::1]:1"}) {
        EXPECT_TRUE(is_local(target)) << target;
    }
    for (const std::string target :
         {"gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1",
          "localhost.example", "127.0.0.1.example:1", "dns://8.8.8.8/localhost:1", "vsock:1:1", ""}) {
        EXPECT_FALSE(is_local(target)) << target;
    }
}

// A token goes over plain TCP to another host only when one says so.
TEST(TokenInTheClear, IsRefused) {
    ClientOptions token;
    token.token = "secret";
    ClientOptions source;
    source.token_source = [] { return std::string("secret"); };
    ClientOptions insecure = token;
    insecure.allow_insecure_token = true;
    ClientOptions secure = token;
    secure.tls.emplace();
    for (const std::string target :
         {"gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1"}) {
        EXPECT_THROW(Client(target, token), SetupError) << target;
        EXPECT_THROW(Client(target, source), SetupError) << target;
        EXPECT_NO_THROW(Client(target, insecure)) << target;
        EXPECT_NO_THROW(Client(target, secure)) << target;
    }
    for (const std::string target : {"unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1"}) {
        EXPECT_NO_THROW(Client(target, token)) << target;
    }
    testing::passed("token_in_the_clear");
}

// What cannot work is told at once.
TEST(Options, AreChecked) {
    const auto refused = [](auto change) {
        ClientOptions options;
        change(options);
        EXPECT_THROW(Client("unix:s", options), SetupError);
    };
    EXPECT_THROW(Client(""), SetupError);
    refused([](ClientOptions& o) { o.max_attempts = 0; });
    refused([](ClientOptions& o) { o.max_attempts = 6; });
    refused([](ClientOptions& o) { o.keepalive = 0s; });
    refused([](ClientOptions& o) { o.keepalive_timeout = -1ms; });
    refused([](ClientOptions& o) { o.token = "two\nlines"; });
    refused([](ClientOptions& o) { o.client_id = "na\xc3\xafve"; });
    refused([](ClientOptions& o) { o.tls.emplace().root_certificates = "no PEM"; });
    refused([](ClientOptions& o) { o.tls.emplace().certificate_chain = "-----BEGIN CERTIFICATE-----"; });
    EXPECT_THROW(Tls::from_files("/none/such.pem"), SetupError);
}

// A token that no header may hold fails the call; gRPC would end the process.
TEST(Token, OfASourceIsChecked) {
    ClientOptions options;
    options.token_source = [] { return std::string("two\nlines"); };
    const Client client("unix:none", options);
    EXPECT_THROW(client.call(&Admin::GetStatus, {}, 1s), RequestError);
    EXPECT_THROW(client.generate({}), RequestError);
}

// gRPC is told to try again what may pass, but never EvictGraph, and takes no policy of one attempt.
TEST(ServiceConfig, IsJsonWithThePolicy) {
    for (const int max_attempts : {1, 4}) {
        google::protobuf::Struct config;
        ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(service_config(max_attempts), &config).ok());
        const auto& methods = config.fields().at("methodConfig").list_value();
        ASSERT_EQ(methods.values_size(), 2);
        const auto& all = methods.values(0).struct_value().fields();
        ASSERT_EQ(all.count("retryPolicy"), max_attempts > 1 ? 1u : 0u);
        if (max_attempts > 1) {
            EXPECT_EQ(all.at("retryPolicy").struct_value().fields().at("maxAttempts").number_value(), max_attempts);
        }
        const auto& evict = methods.values(1).struct_value().fields();
        EXPECT_EQ(evict.at("name").list_value().values(0).struct_value().fields().at("method").string_value(),
                  "EvictGraph");
        EXPECT_EQ(evict.count("retryPolicy"), 0u);
    }
}

// A key goes as it is where a header may hold it.
TEST(SessionKey, IsHashedWhereNoHeaderHoldsIt) {
    EXPECT_EQ(session_id("user 7"), "user 7");
    for (const std::string key : {" user", "user ", "na\xc3\xafve", "a\tb", "\x7f"})
        EXPECT_EQ(session_id(key), sha256_hex(key));
}

// A call to nobody fails as one that may pass, within its time, and a generation of it does too.
TEST(Nobody, IsUnavailable) {
    const Client client("unix:/none/such.sock");
    EXPECT_THROW(client.call(&Admin::GetStatus, {}, 5s), RetryableError);
    v1::GenerateRequest request;
    request.set_text("x");
    GenerateOptions options;
    options.timeout = 5s;
    Generation generation = client.generate(request, options);
    EXPECT_THROW(generation.next(), RetryableError);
    EXPECT_THROW(generation.next(), RetryableError);  // and again
    EXPECT_FALSE(generation.started());
    EXPECT_THROW(client.check_health("", 5s), RetryableError);
    HealthWatch watch = client.watch_health();
    EXPECT_THROW(watch.next(), RetryableError);
}

// Waiting for a server ends at the deadline.
TEST(Nobody, IsWaitedForUntilTheDeadline) {
    ClientOptions patient;
    patient.wait_for_ready = true;
    const Client client("unix:/none/such.sock", patient);
    EXPECT_THROW(client.call(&Admin::GetStatus, {}, 200ms), DeadlineError);
    GenerateOptions options;
    options.timeout = 200ms;
    EXPECT_THROW(client.generate({}, options).result(), DeadlineError);
}

}  // namespace
}  // namespace hotgraph
