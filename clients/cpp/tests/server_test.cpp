// Generations against a server in this process, which does what no real daemon does when asked.

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "hotgraph/hotgraph.hpp"
#include "sha256.hpp"

namespace hotgraph {
namespace {

using namespace std::chrono_literals;
using SteadyClock = std::chrono::steady_clock;
using Writer = grpc::ServerWriter<v1::GenerateResponse>;

constexpr auto kPatience = 30s;

v1::GenerateResponse started() {
    v1::GenerateResponse event;
    event.mutable_started()->set_request_id("r");
    event.mutable_started()->set_seed(7);
    return event;
}

v1::GenerateResponse token(std::uint32_t id) {
    v1::GenerateResponse event;
    event.mutable_tokens()->add_token_ids(id);
    event.mutable_tokens()->set_text(std::to_string(id));
    return event;
}

v1::GenerateResponse finished() {
    v1::GenerateResponse event;
    event.mutable_finished()->add_choices()->set_reason(v1::FINISH_REASON_LENGTH);
    return event;
}

v1::GenerateRequest seeded() {
    v1::GenerateRequest request;
    request.set_text("x");
    request.mutable_sampling()->set_seed(7);
    return request;
}

// Answers each Generate, by its number from 0, as the test says; keeps requests and metadata.
class Server final : public v1::InferenceService::Service {
  public:
    using Answer = std::function<grpc::Status(int number, grpc::ServerContext&, Writer&)>;

    explicit Server(Answer answer) : answer_(std::move(answer)) {
        static std::atomic<int> number = 0;
        path_ = "/tmp/hotgraph-cpp-" + std::to_string(getpid()) + "-" + std::to_string(number++) + ".sock";
        grpc::ServerBuilder builder;
        builder.AddListeningPort(target(), grpc::InsecureServerCredentials());
        builder.RegisterService(this);
        server_ = builder.BuildAndStart();
    }

    ~Server() override {
        server_->Shutdown(std::chrono::system_clock::now());
        std::remove(path_.c_str());
    }

    std::string target() const { return "unix:" + path_; }

    std::vector<v1::GenerateRequest> requests() const {
        const std::lock_guard lock(mutex_);
        return requests_;
    }

    std::map<std::string, std::string> metadata() const {
        const std::lock_guard lock(mutex_);
        return metadata_;
    }

    grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request, Writer* writer) override {
        int number = 0;
        {
            const std::lock_guard lock(mutex_);
            number = static_cast<int>(requests_.size());
            requests_.push_back(*request);
            for (const auto& [key, value] : context->client_metadata()) {
                metadata_[std::string(key.data(), key.size())] = std::string(value.data(), value.size());
            }
        }
        return answer_(number, *context, *writer);
    }

  private:
    const Answer answer_;
    std::string path_;
    std::unique_ptr<grpc::Server> server_;
    mutable std::mutex mutex_;
    std::vector<v1::GenerateRequest> requests_;
    std::map<std::string, std::string> metadata_;
};

// Holds a call until its client has left, as a process that hangs does.
void hang(const grpc::ServerContext& context) {
    const auto end = SteadyClock::now() + kPatience;
    while (!context.IsCancelled() && SteadyClock::now() < end) std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(context.IsCancelled());
}

// A pause between tokens that is too long is a lost server: the answer goes on with the tokens it has.
TEST(Server, ThatPausesTooLongIsLost) {
    Server server([](int number, grpc::ServerContext& context, Writer& writer) {
        writer.Write(started());
        if (number == 0) {
            writer.Write(token(1));
            hang(context);
            return grpc::Status::CANCELLED;
        }
        writer.Write(token(2));
        writer.Write(finished());
        return grpc::Status::OK;
    });
    GenerateOptions options;
    options.resume_policy.emplace().idle = 1s;
    Generation generation = Client(server.target()).generate(seeded(), options);
    const auto answer = generation.result();
    EXPECT_EQ(answer.choices(0).text(), "12");
    EXPECT_EQ(generation.num_resumes(), 1);
    ASSERT_EQ(server.requests().size(), 2u);
    EXPECT_EQ(server.requests()[1].request_id(), "r/resume-1");
    EXPECT_EQ(server.requests()[1].resume(0).token_ids(0), 1u);
}

// Any thread may cancel while another waits for an event.
TEST(Server, ThatSaysNothingCanBeLeftByAnotherThread) {
    Server server([](int, grpc::ServerContext& context, Writer& writer) {
        writer.Write(started());
        hang(context);
        return grpc::Status::CANCELLED;
    });
    Generation generation = Client(server.target()).generate(seeded());
    ASSERT_TRUE(generation.next()->has_started());
    std::thread canceller([&] {
        std::this_thread::sleep_for(50ms);
        generation.cancel();
    });
    EXPECT_THROW(generation.next(), CancelledError);
    canceller.join();
}

// A token's source that fails before a later connection ends the generation with its error, also for who asks again.
TEST(Server, ThatIsLostIsNotReachedWithoutAToken) {
    Server server([](int, grpc::ServerContext&, Writer& writer) {
        writer.Write(started());
        return grpc::Status(grpc::StatusCode::INTERNAL, "broken");
    });
    int num_asked = 0;
    ClientOptions options;
    options.token_source = [&]() -> std::string {
        if (num_asked++ > 0) throw std::runtime_error("no token");
        return "secret";
    };
    Generation generation = Client(server.target(), options).generate(seeded());
    ASSERT_TRUE(generation.next()->has_started());
    EXPECT_THROW(generation.next(), std::runtime_error);
    EXPECT_THROW(generation.next(), std::runtime_error);
    EXPECT_EQ(num_asked, 2);
}

// A cancel ends the wait before the next connection too.
TEST(Server, ThatIsLostCanBeLeftWhileOneWaits) {
    Server server([](int, grpc::ServerContext&, Writer& writer) {
        writer.Write(started());
        return grpc::Status(grpc::StatusCode::INTERNAL, "broken");
    });
    GenerateOptions options;
    options.resume_policy.emplace().first_backoff = options.resume_policy->max_backoff = 1h;
    Generation generation = Client(server.target()).generate(seeded(), options);
    ASSERT_TRUE(generation.next()->has_started());
    std::thread canceller([&] {
        std::this_thread::sleep_for(50ms);
        generation.cancel();
    });
    EXPECT_THROW(generation.next(), CancelledError);
    canceller.join();
}

// The call's own deadline ends a stream that the server would leave open, and the request's does after its grace.
TEST(Server, ThatSaysNothingIsLeftAtTheDeadline) {
    Server server([](int, grpc::ServerContext& context, Writer& writer) {
        writer.Write(started());
        hang(context);
        return grpc::Status::CANCELLED;
    });
    const Client client(server.target());
    GenerateOptions options;
    options.timeout = 100ms;
    EXPECT_THROW(client.generate(seeded(), options).result(), DeadlineError);
    v1::GenerateRequest request = seeded();
    request.mutable_timeout()->set_nanos(100000000);
    const auto begin = SteadyClock::now();
    EXPECT_THROW(client.generate(request).result(), DeadlineError);
    EXPECT_GE(SteadyClock::now() - begin, 2s);
}

// A reader that has all leaves no call behind that looks cancelled, though it did not read on to the end.
TEST(Server, ThatToldAllIsNotCancelled) {
    std::atomic<int> was_cancelled = -1;
    {
        Server server([&](int, grpc::ServerContext& context, Writer& writer) {
            writer.Write(started());
            writer.Write(finished());
            std::this_thread::sleep_for(100ms);
            was_cancelled = context.IsCancelled();
            return grpc::Status::OK;
        });
        Generation generation = Client(server.target()).generate(seeded());
        while (!generation.next()->has_finished()) {
            // The next one is wanted.
        }
    }
    EXPECT_EQ(was_cancelled, 0);
}

// What gRPC tries again by itself reaches the caller as one stream; nothing was resumed.
TEST(Server, ThatRefusesAtFirstIsTriedAgain) {
    Server server([](int number, grpc::ServerContext&, Writer& writer) {
        if (number < 2) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "not yet");
        writer.Write(started());
        writer.Write(finished());
        return grpc::Status::OK;
    });
    Generation generation = Client(server.target()).generate(seeded());
    generation.result();
    EXPECT_EQ(generation.num_resumes(), 0);
    EXPECT_EQ(server.requests().size(), 3u);
}

// Every call carries what the client was told, and the key that a balancer hashes.
TEST(Server, IsToldTokenClientAndSession) {
    Server server([](int, grpc::ServerContext&, Writer& writer) {
        writer.Write(started());
        writer.Write(finished());
        return grpc::Status::OK;
    });
    ClientOptions options;
    options.token = "secret";
    options.client_id = "me";
    v1::GenerateRequest request = seeded();
    request.set_session_key("na\xc3\xafve");
    Client(server.target(), options).generate(request).result();
    auto metadata = server.metadata();
    EXPECT_EQ(metadata["authorization"], "bearer secret");
    EXPECT_EQ(metadata["x-client-id"], "me");
    EXPECT_EQ(metadata["session_id"], sha256_hex(request.session_key()));
    EXPECT_EQ(metadata["user-agent"].rfind("hotgraph-cpp/0.1.0 ", 0), 0u) << metadata["user-agent"];
}

}  // namespace
}  // namespace hotgraph
