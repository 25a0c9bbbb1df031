// A connection to a daemon, and the calls that want more than their stub.
#pragma once

#include <google/protobuf/message_lite.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "hotgraph/error.hpp"
#include "hotgraph/generation.hpp"
#include "hotgraph/options.hpp"
#include "hotgraph/v1/admin_service.grpc.pb.h"
#include "hotgraph/v1/graph_service.grpc.pb.h"
#include "hotgraph/v1/inference_service.grpc.pb.h"
#include "hotgraph/watch.hpp"

namespace hotgraph {

// The stubs, whose methods Client::call takes.
using Inference = v1::InferenceService::Stub;
using Graphs = v1::GraphService::Stub;
using Admin = v1::AdminService::Stub;

// A connection to a daemon. Threads share it, and copies share the connection, which closes with the last of them and
// of their generations and watches.
class Client {
  public:
    // It connects with the first call. target: unix:PATH, HOST:PORT, ipv4:10.0.0.1:50051,10.0.0.2:50051 or any other
    // name that gRPC resolves. Throws SetupError for what cannot work or is not safe.
    explicit Client(const std::string& target = kDefaultTarget, ClientOptions options = {});

    // Starts a generation. What goes wrong with the call is told by the first read. Throws DeadlineError when its time
    // is over already, and what the token's source throws.
    Generation generate(v1::GenerateRequest request, const GenerateOptions& options = {}) const;

    // Generates and answers once, with all of it. It is one unary call, which gRPC sends again when the server is not
    // reached; generate(...).result() goes on after a lost server as well.
    v1::CompleteResponse complete(const v1::GenerateRequest& request, Timeout timeout = {}) const;

    // Any unary call of the contract, by its stub's method: `client.call(&hotgraph::Admin::GetStatus, {})`. Throws
    // Error.
    template <class Stub, class Request, class Response>
    Response call(grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                  const std::common_type_t<Request>& request, Timeout timeout = {}) const {
        grpc::ClientContext context;
        prepare(context, timeout);
        Response response;
        check((stub(static_cast<Stub*>(nullptr)).*method)(&context, request, &response));
        return response;
    }

    // Any unary call by its path, such as "/hotgraph.v1.AdminService/GetStatus": for services that this package does
    // not know.
    void call(const std::string& path, const google::protobuf::MessageLite& request,
              google::protobuf::MessageLite& response, Timeout timeout = {}) const;

    // Lists of all pages: the models that can be asked for; entries of the graph cache, most hits first, in the
    // request's states, its page size at a time; who called since the daemon's start.
    std::vector<v1::Model> all_models() const;
    std::vector<v1::Graph> all_graphs(v1::ListGraphsRequest request = {}) const;
    std::vector<v1::Client> all_clients() const;

    // Events of the graph cache. after: kept events after this sequence number first, 0 for all; absent: only what
    // happens from now on. When its server is lost, watch again after the last sequence number.
    GraphWatch watch_graphs(std::optional<std::uint64_t> after = {}) const;
    // The health of the daemon (""), of one service, or of "hotgraph.warm"; the watch tells it now and whenever it
    // changes.
    Health check_health(const std::string& service = "", Timeout timeout = {}) const;
    HealthWatch watch_health(const std::string& service = "") const;

    // The stubs and the channel themselves, for calls with a context of one's own; prepare it first. They return
    // statuses, which hotgraph::check turns into errors.
    Inference& inference() const;
    Graphs& graphs() const;
    Admin& admin() const;
    std::shared_ptr<grpc::Channel> channel() const;
    // Gives the context what every call has: token, client id, deadline, and what a balancer hashes.
    void prepare(grpc::ClientContext& context, Timeout timeout = {}, const std::string& session_key = "") const;

  private:
    struct State;

    Inference& stub(Inference*) const { return inference(); }
    Graphs& stub(Graphs*) const { return graphs(); }
    Admin& stub(Admin*) const { return admin(); }

    std::shared_ptr<const State> state_;
};

// Turns of a conversation: instructions for all of it, who asks, the model.
v1::ChatMessage system(std::string text);
v1::ChatMessage user(std::string text);
v1::ChatMessage assistant(std::string text);
// A conversation, oldest turn first.
v1::ChatPrompt chat(std::initializer_list<v1::ChatMessage> messages);

}  // namespace hotgraph
