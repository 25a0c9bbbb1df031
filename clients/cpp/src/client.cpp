#include "hotgraph/client.hpp"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>

#include <chrono>
#include <utility>

#include "generic.hpp"
#include "reader.hpp"
#include "settings.hpp"

namespace hotgraph {
namespace {

constexpr auto kLongest = std::chrono::hours(24 * 365);  // what is longer is no limit; sums of it do not overflow

v1::ChatMessage turn(v1::ChatRole role, std::string text) {
    v1::ChatMessage message;
    message.set_role(role);
    message.set_content(std::move(text));
    return message;
}

// All of a list: list(token) gives the page of a token, take(page) keeps it.
template <class List, class Take>
void read_pages(List list, Take take) {
    std::string token;
    do {
        const auto page = list(token);
        take(page);
        token = page.next_page_token();
    } while (!token.empty());
}

}  // namespace

struct Client::State {
    State(const std::string& target, ClientOptions told)
        : options(std::move(told)),
          channel(grpc::CreateCustomChannel(target, channel_credentials(options), channel_arguments(target, options))),
          inference(v1::InferenceService::NewStub(channel)),
          graphs(v1::GraphService::NewStub(channel)),
          admin(v1::AdminService::NewStub(channel)) {}

    const ClientOptions options;
    const std::shared_ptr<grpc::Channel> channel;
    const std::unique_ptr<Inference> inference;
    const std::unique_ptr<Graphs> graphs;
    const std::unique_ptr<Admin> admin;
};

Client::Client(const std::string& target, ClientOptions options) {
    check_options(target, options);
    state_ = std::make_shared<const State>(target, std::move(options));
}

Generation Client::generate(v1::GenerateRequest request, const GenerateOptions& options) const {
    const ClientOptions& ours = state_->options;
    return Generation(
        std::make_unique<Generation::Reader>(*this, std::move(request), options.resume.value_or(ours.resume),
                                             options.resume_policy.value_or(ours.resume_policy), options.timeout));
}

v1::CompleteResponse Client::complete(const v1::GenerateRequest& request, Timeout timeout) const {
    v1::CompleteRequest unary;
    if (!unary.ParseFromString(request.SerializeAsString())) {  // the same field by field
        throw RequestError(own_failure(grpc::StatusCode::INVALID_ARGUMENT, "the request holds text that is not UTF-8"));
    }
    grpc::ClientContext context;
    prepare(context, timeout, request.session_key());
    v1::CompleteResponse response;
    check(inference().Complete(&context, unary, &response));
    return response;
}

void Client::call(const std::string& path, const google::protobuf::MessageLite& request,
                  google::protobuf::MessageLite& response, Timeout timeout) const {
    grpc::ClientContext context;
    prepare(context, timeout);
    grpc::GenericStub stub(state_->channel);
    grpc::CompletionQueue queue;
    grpc::ByteBuffer answer;
    grpc::Status status;
    const auto call = stub.PrepareUnaryCall(&context, path, packed(request), &queue);
    call->StartCall();
    call->Finish(&answer, &status, &queue);
    void* tag = nullptr;
    bool is_ok = false;
    queue.Next(&tag, &is_ok);
    check(status);
    unpack(answer, response);
}

std::vector<v1::Model> Client::all_models() const {
    std::vector<v1::Model> found;
    v1::ListModelsRequest request;
    read_pages(
        [&](const std::string& token) {
            request.set_page_token(token);
            return call(&Inference::ListModels, request);
        },
        [&](const v1::ListModelsResponse& page) {
            found.insert(found.end(), page.models().begin(), page.models().end());
        });
    return found;
}

std::vector<v1::Graph> Client::all_graphs(v1::ListGraphsRequest request) const {
    std::vector<v1::Graph> found;
    read_pages(
        [&](const std::string& token) {
            request.set_page_token(token);
            return call(&Graphs::ListGraphs, request);
        },
        [&](const v1::ListGraphsResponse& page) {
            found.insert(found.end(), page.graphs().begin(), page.graphs().end());
        });
    return found;
}

std::vector<v1::Client> Client::all_clients() const {
    std::vector<v1::Client> found;
    v1::ListClientsRequest request;
    request.set_page_size(1000);
    read_pages(
        [&](const std::string& token) {
            request.set_page_token(token);
            return call(&Admin::ListClients, request);
        },
        [&](const v1::ListClientsResponse& page) {
            found.insert(found.end(), page.clients().begin(), page.clients().end());
        });
    return found;
}

Inference& Client::inference() const { return *state_->inference; }
Graphs& Client::graphs() const { return *state_->graphs; }
Admin& Client::admin() const { return *state_->admin; }
std::shared_ptr<grpc::Channel> Client::channel() const { return state_->channel; }

void Client::prepare(grpc::ClientContext& context, Timeout timeout, const std::string& session_key) const {
    add_metadata(context, state_->options, session_key);
    if (state_->options.wait_for_ready) context.set_wait_for_ready(true);
    if (timeout && *timeout < kLongest) {
        context.set_deadline(std::chrono::system_clock::now() +
                             std::chrono::duration_cast<std::chrono::microseconds>(*timeout));
    }
}

v1::ChatMessage system(std::string text) { return turn(v1::CHAT_ROLE_SYSTEM, std::move(text)); }
v1::ChatMessage user(std::string text) { return turn(v1::CHAT_ROLE_USER, std::move(text)); }
v1::ChatMessage assistant(std::string text) { return turn(v1::CHAT_ROLE_ASSISTANT, std::move(text)); }

v1::ChatPrompt chat(std::initializer_list<v1::ChatMessage> messages) {
    v1::ChatPrompt prompt;
    for (const v1::ChatMessage& message : messages) *prompt.add_messages() = message;
    return prompt;
}

}  // namespace hotgraph
