// The cases of tests/interop/cases.json against real daemons with a real model.

#include <google/protobuf/empty.pb.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "hotgraph/hotgraph.hpp"
#include "report.hpp"

namespace hotgraph {
namespace {

using namespace std::chrono_literals;
using grpc::StatusCode;
using SteadyClock = std::chrono::steady_clock;

constexpr auto kPatience = 60s;  // for what takes a second on a quiet machine
constexpr std::uint64_t kLargestSeed = ~std::uint64_t{0};

// One pangram with an emoji, all control characters but those that text cannot hold, and NUL.
const std::string kStrange(
    "Zw\xc3\xb6lf Boxk\xc3\xa4mpfer \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x98\x80 e\xcc\x81 tab\t newline\n return\r "
    "bell\a "
    "escape\x1b delete\x7f nul\0 end",
    87);

// gRPC's own retries are off, so that each refusal is seen at once.
ClientOptions once() {
    ClientOptions options;
    options.max_attempts = 1;
    return options;
}

v1::GenerateRequest greedy(const std::string& prompt, std::uint32_t max_tokens) {
    v1::GenerateRequest request;
    request.set_text(prompt);
    request.set_max_tokens(max_tokens);
    request.mutable_sampling()->set_temperature(0);
    request.mutable_stop()->set_ignore_eos(true);
    return request;
}

// The failure that the call must end with.
template <class Call>
Failure refusal(Call call, StatusCode code, v1::ErrorReason reason = v1::ERROR_REASON_UNSPECIFIED) {
    try {
        call();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), code) << error.what();
        EXPECT_EQ(error.reason(), reason) << error.what();
        return error.failure();
    }
    ADD_FAILURE() << "nothing was refused";
    return {};
}

std::vector<std::uint32_t> ids_of(const v1::Choice& choice) {
    return {choice.token_ids().begin(), choice.token_ids().end()};
}

// Waits until no request holds a slot.
void wait_free(const Client& client) {
    const auto end = SteadyClock::now() + kPatience;
    for (;;) {
        const auto status = client.call(&Admin::GetStatus, {});
        if (status.scheduler().num_running() == 0 && status.scheduler().num_waiting() == 0 &&
            status.kv_cache().num_used_blocks() == 0) {
            return;
        }
        ASSERT_LT(SteadyClock::now(), end) << "slots are still held: " << status.DebugString();
        std::this_thread::sleep_for(5ms);
    }
}

std::uint32_t num_running(const Client& client) { return client.call(&Admin::GetStatus, {}).scheduler().num_running(); }

// Tests against the daemon that serves all the time.
class Interop : public ::testing::Test {
  protected:
    void SetUp() override {
        HOTGRAPH_NEED_DAEMONS();
        told = testing::daemons();
        client.emplace(told.unix_socket, once());
    }

    testing::Addresses told;
    std::optional<Client> client;
};

// A call whose request has no field (GetStatus) answers.
TEST_F(Interop, UnaryEmpty) {
    const auto status = client->call(&Admin::GetStatus, {});
    EXPECT_EQ(status.state(), v1::DAEMON_STATE_SERVING);
    EXPECT_EQ(status.model(), told.model);
    testing::passed("unary_empty");
}

// Tokenize of a text of 1 MB answers with pieces that join to that text.
TEST_F(Interop, UnaryLarge) {
    std::string text;
    while (text.size() < 1 << 20) text += "All that is gold does not glitter; \xc3\xa9\xe6\xbc\xa2\xf0\x9f\x98\x80 ";
    v1::TokenizeRequest request;
    request.set_text(text);
    request.set_add_special_tokens(false);
    const auto answer = client->call(&Inference::Tokenize, request);
    std::string joined;
    for (const std::string& piece : answer.pieces()) joined += piece;
    EXPECT_TRUE(joined == text) << joined.size() << " bytes came back of " << text.size();
    testing::passed("unary_large");
}

// A request over the server's limit fails as MESSAGE_TOO_LARGE with the limit in the metadata.
TEST_F(Interop, RequestTooLarge) {
    v1::TokenizeRequest request;
    request.set_text(std::string(5 << 20, 'x'));
    const Failure failure = refusal([&] { client->call(&Inference::Tokenize, request); },
                                    StatusCode::RESOURCE_EXHAUSTED, v1::ERROR_REASON_MESSAGE_TOO_LARGE);
    EXPECT_EQ(failure.metadata.at("limit_bytes"), std::to_string(4 << 20));
    EXPECT_EQ(failure.kind(), Kind::request);
    testing::passed("request_too_large");
}

// UTF-8 of every length, control characters and NUL come back from Detokenize as they went to Tokenize.
TEST_F(Interop, Text) {
    ASSERT_EQ(kStrange.substr(kStrange.size() - 5), std::string("\0 end", 5));
    v1::TokenizeRequest request;
    request.set_text(kStrange);
    request.set_add_special_tokens(false);
    v1::DetokenizeRequest back;
    *back.mutable_token_ids() = client->call(&Inference::Tokenize, request).token_ids();
    EXPECT_EQ(client->call(&Inference::Detokenize, back).text(), kStrange);
    testing::passed("text");
}

// Generate tells started, tokens and finished in this order, with usage, timings and receipt.
TEST_F(Interop, Stream) {
    std::vector<v1::GenerateResponse::EventCase> order;
    std::string text;
    int num_tokens = 0;
    Generation generation = client->generate(greedy("The sky is", 12));
    for (const v1::GenerateResponse& event : generation) {
        if (order.empty() || order.back() != event.event_case()) order.push_back(event.event_case());
        text += event.tokens().text();
        num_tokens += event.tokens().token_ids_size();
    }
    using E = v1::GenerateResponse;
    EXPECT_EQ(order, (std::vector<E::EventCase>{E::kStarted, E::kTokens, E::kFinished}));
    const v1::Finished finished = generation.finished().value();
    EXPECT_EQ(num_tokens, 12);
    EXPECT_EQ(finished.usage().completion_tokens(), 12u);
    EXPECT_EQ(text, generation.text());
    EXPECT_FALSE(text.empty());
    EXPECT_GT(finished.timings().total().seconds() + finished.timings().total().nanos(), 0);
    EXPECT_GT(finished.receipt().num_steps(), 0u);
    EXPECT_EQ(finished.choices(0).reason(), v1::FINISH_REASON_LENGTH);

    Generation again = client->generate(greedy("The sky is", 12));
    std::string pieces;
    for (const std::string& piece : again.texts()) pieces += piece;
    EXPECT_EQ(pieces, text);
    EXPECT_FALSE(again.next());
    wait_free(*client);
    testing::passed("stream");
}

// Complete gives the ids and the text of Generate for the same seed.
TEST_F(Interop, StreamIsUnary) {
    v1::GenerateRequest request;
    request.set_text("Once upon a time");
    request.set_max_tokens(16);
    request.set_num_choices(2);
    request.mutable_sampling()->set_seed(kLargestSeed);
    request.mutable_sampling()->set_temperature(0.8F);
    request.mutable_output()->set_logprobs(2);
    const auto streamed = client->generate(request).result();
    const auto unary = client->complete(request);
    ASSERT_EQ(unary.choices_size(), 2);
    ASSERT_EQ(streamed.choices_size(), 2);
    EXPECT_EQ(unary.seed(), kLargestSeed);
    for (int i = 0; i < 2; ++i) {
        EXPECT_EQ(ids_of(streamed.choices(i)), ids_of(unary.choices(i)));
        EXPECT_EQ(streamed.choices(i).text(), unary.choices(i).text());
        for (const auto* choice : {&streamed.choices(i), &unary.choices(i)}) {
            EXPECT_EQ(choice->logprobs_size(), choice->token_ids_size());
        }
    }
    testing::passed("stream_is_unary");
}

// A conversation in the model's own template is answered: the capital of France is Paris.
TEST_F(Interop, Chat) {
    v1::GenerateRequest request = greedy("", 24);
    request.clear_stop();
    *request.mutable_chat() = chat({system("Be brief."), user("What is the capital of France?")});
    const auto answer = client->generate(request).result();
    EXPECT_NE(answer.choices(0).text().find("Paris"), std::string::npos) << answer.choices(0).text();
    testing::passed("chat");
}

// A reader that stops for a while gets every token all the same, and others are served meanwhile.
TEST_F(Interop, SlowReader) {
    const v1::GenerateRequest request = greedy("The sky is", 40);
    const auto fast = client->generate(request).result();
    Generation generation = client->generate(request);
    int num_events = 0;
    for (const auto& event : generation) {
        if (event.has_tokens() && ++num_events == 2) {
            client->complete(greedy("others", 4));
            std::this_thread::sleep_for(1s);
        }
    }
    EXPECT_EQ(ids_of(generation.choices()[0]), ids_of(fast.choices(0)));
    testing::passed("slow_reader");
}

// A stream left before its first event holds no slot any more.
TEST_F(Interop, CancelAtOnce) {
    Generation generation = client->generate(greedy("The sky is", 1000));
    generation.cancel();
    EXPECT_EQ(refusal([&] { generation.next(); }, StatusCode::CANCELLED).kind(), Kind::cancelled);
    wait_free(*client);
    { Generation left = client->generate(greedy("The sky is", 1000)); }  // its end of life does the same
    wait_free(*client);
    testing::passed("cancel_at_once");
}

// A stream left after some tokens ends as cancelled and holds no slot any more.
TEST_F(Interop, CancelMidway) {
    {
        Generation generation = client->generate(greedy("The sky is", 1000));
        for (const auto& event : generation) {
            if (!event.has_tokens() || generation.choices()[0].token_ids_size() < 3) continue;
            EXPECT_EQ(num_running(*client), 1u);
            break;
        }
    }
    wait_free(*client);
    Generation again = client->generate(greedy("The sky is", 1000));
    EXPECT_THROW(
        for (const auto& event
             : again) {
            if (event.has_tokens()) again.cancel();
        },
        CancelledError);
    refusal([&] { again.next(); }, StatusCode::CANCELLED);
    wait_free(*client);
    testing::passed("cancel_midway");
}

// A call's deadline ends it as DEADLINE_EXCEEDED within a second of its time, and the slot is free.
TEST_F(Interop, Deadline) {
    const auto begin = SteadyClock::now();
    GenerateOptions options;
    options.timeout = 700ms;
    EXPECT_THROW(client->generate(greedy("The sky is", 1000), options).result(), DeadlineError);
    EXPECT_LT(SteadyClock::now() - begin, 1700ms);
    wait_free(*client);
    EXPECT_THROW(client->complete(greedy("The sky is", 1000), 700ms), DeadlineError);
    wait_free(*client);
    testing::passed("deadline");
}

// GenerateRequest.timeout ends the request as DEADLINE_EXCEEDED without a deadline of the call.
TEST_F(Interop, TimeoutField) {
    v1::GenerateRequest request = greedy("The sky is", 1000);
    request.mutable_timeout()->set_nanos(500000000);
    refusal([&] { client->generate(request).result(); }, StatusCode::DEADLINE_EXCEEDED,
            v1::ERROR_REASON_DEADLINE_EXCEEDED);
    wait_free(*client);
    testing::passed("timeout_field");
}

// An invalid request names each of its wrong fields, and why.
TEST_F(Interop, Violations) {
    v1::GenerateRequest request;
    request.set_request_id("no spaces");
    request.set_text("");
    request.set_max_tokens(0);
    request.set_num_choices(17);
    v1::SamplingParams& sampling = *request.mutable_sampling();
    sampling.set_temperature(3);
    sampling.set_top_p(0);
    sampling.set_min_p(2);
    sampling.set_repetition_penalty(0);
    sampling.set_presence_penalty(-3);
    sampling.set_frequency_penalty(3);
    sampling.add_logit_bias()->set_token_id(1);
    sampling.mutable_logit_bias(0)->set_bias(101);
    request.mutable_stop()->add_strings("");
    request.mutable_output()->set_logprobs(21);
    request.mutable_timeout()->set_seconds(-1);
    const Failure failure =
        refusal([&] { client->complete(request); }, StatusCode::INVALID_ARGUMENT, v1::ERROR_REASON_INVALID_REQUEST);
    std::set<std::string> fields;
    for (const Violation& violation : failure.violations) {
        fields.insert(violation.field);
        EXPECT_FALSE(violation.description.empty()) << violation.field;
    }
    const std::set<std::string> wanted = {"max_tokens",
                                          "num_choices",
                                          "output.logprobs",
                                          "request_id",
                                          "sampling.frequency_penalty",
                                          "sampling.logit_bias[0].bias",
                                          "sampling.min_p",
                                          "sampling.presence_penalty",
                                          "sampling.repetition_penalty",
                                          "sampling.temperature",
                                          "sampling.top_p",
                                          "stop.strings[0]",
                                          "text",
                                          "timeout"};
    EXPECT_EQ(fields, wanted);
    EXPECT_EQ(failure.violations.size(), wanted.size());
    testing::passed("violations");
}

// A status message and details with UTF-8 and control characters arrive as they were sent.
TEST_F(Interop, StatusMessage) {
    v1::GetModelRequest request;
    request.set_name("na\xc3\xafve \xf0\x9f\x98\x80\t\n\x7f%");
    const Failure failure = refusal([&] { client->call(&Inference::GetModel, request); }, StatusCode::NOT_FOUND,
                                    v1::ERROR_REASON_MODEL_NOT_FOUND);
    ASSERT_TRUE(failure.resource);
    EXPECT_EQ(failure.resource->name, request.name());
    EXPECT_NE(failure.message.find("na\xc3\xafve \xf0\x9f\x98\x80"), std::string::npos) << failure.message;
    testing::passed("status_message");
}

// NOT_FOUND tells the type and the name of what is not there.
TEST_F(Interop, NotFound) {
    v1::GetGraphRequest request;
    request.set_name("graphs/none");
    const Failure failure = refusal([&] { client->call(&Graphs::GetGraph, request); }, StatusCode::NOT_FOUND,
                                    v1::ERROR_REASON_GRAPH_NOT_FOUND);
    ASSERT_TRUE(failure.resource);
    EXPECT_EQ(failure.resource->type, "hotgraph.v1.Graph");
    EXPECT_EQ(failure.resource->name, "graphs/none");
    testing::passed("not_found");
}

// A refusal that may pass tells after how long to come again.
TEST_F(Interop, RetryInfo) {
    // What another test captured goes, so that there is something to wait for.
    v1::ListGraphsRequest ready;
    ready.add_states(v1::GRAPH_STATE_READY);
    for (const v1::Graph& graph : client->all_graphs(ready)) {
        v1::EvictGraphRequest evict;
        evict.set_name(graph.name());
        client->call(&Graphs::EvictGraph, evict);
    }
    v1::GenerateRequest request = greedy("The sky is", 4);
    request.set_num_choices(7);
    request.mutable_sampling()->set_top_k(5);
    request.mutable_sampling()->set_temperature(1);
    request.mutable_graph_policy()->set_mode(v1::GRAPH_MODE_REQUIRE);
    const Failure failure =
        refusal([&] { client->generate(request).result(); }, StatusCode::UNAVAILABLE, v1::ERROR_REASON_GRAPH_NOT_READY);
    EXPECT_GT(failure.retry_after.value_or(0ns), 0ns);
    EXPECT_EQ(failure.kind(), Kind::retryable);
    testing::passed("retry_info");
}

// An unknown method and an unknown service fail as UNIMPLEMENTED.
TEST_F(Interop, Unimplemented) {
    google::protobuf::Empty empty;
    for (const std::string method : {"/hotgraph.v1.InferenceService/Dream", "/hotgraph.v1.DreamService/Dream"}) {
        refusal([&] { client->call(method, empty, empty); }, StatusCode::UNIMPLEMENTED);
    }
    testing::passed("unimplemented");
}

// X-client-id and the user agent are what ListClients shows.
TEST_F(Interop, ClientId) {
    ClientOptions options;
    options.client_id = "interop-cpp";
    Client(told.unix_socket, options).complete(greedy("hello", 1));
    const std::vector<v1::Client> all = client->all_clients();
    EXPECT_TRUE(std::any_of(all.begin(), all.end(), [](const v1::Client& other) {
        return other.name() == "clients/interop-cpp" && other.num_requests() > 0 &&
               other.user_agent().find("hotgraph-cpp/0.1.0 grpc-c++/") != std::string::npos;
    }));
    testing::passed("client_id");
}

// Three graphs to list, to pin and to watch.
class InteropGraphs : public Interop {
  protected:
    void SetUp() override {
        Interop::SetUp();
        if (IsSkipped()) return;
        v1::PrewarmGraphsRequest request;
        for (const std::uint32_t rows : {1, 2, 3}) {
            v1::GraphKey& key = *request.add_keys();
            key.set_tokens(4);
            key.set_rows(rows);
            key.set_sampler(v1::SAMPLER_VARIANT_GREEDY);
        }
        request.mutable_wait()->set_seconds(30);
        const auto prewarmed = client->call(&Graphs::PrewarmGraphs, request, kPatience);
        ASSERT_GE(prewarmed.graphs_size(), 2) << "too few buckets for a list of pages";
        graph = prewarmed.graphs(0);
        ASSERT_EQ(graph.state(), v1::GRAPH_STATE_READY);
    }

    v1::Graph graph;
};

// A list of several pages is read whole.
TEST_F(InteropGraphs, Pages) {
    v1::ListGraphsRequest one;
    one.set_page_size(1);
    std::multiset<std::string> names;
    for (const v1::Graph& each : client->all_graphs(one)) names.insert(each.name());
    EXPECT_EQ(names.size(), client->call(&Graphs::ListGraphs, {}).total_size());
    EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
    const std::vector<v1::Model> models = client->all_models();
    ASSERT_EQ(models.size(), 1u);
    EXPECT_EQ(models[0].id(), told.model);
    testing::passed("pages");
}

// A prewarmed graph is listed, got, pinned and unpinned, and the watch tells of it.
TEST_F(InteropGraphs, Watch) {
    v1::GetGraphRequest get;
    get.set_name(graph.name());
    const auto got = client->call(&Graphs::GetGraph, get);
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(got.graph().key(), graph.key()));
    v1::PinGraphRequest pin;
    pin.set_name(graph.name());
    const auto pinned = client->call(&Graphs::PinGraph, pin);
    EXPECT_GT(pinned.graph().pin().expire_time().seconds(), std::time(nullptr));
    v1::UnpinGraphRequest unpin;
    unpin.set_name(graph.name());
    client->call(&Graphs::UnpinGraph, unpin);

    const std::vector<v1::GraphEventType> wanted = {v1::GRAPH_EVENT_TYPE_PLANNED, v1::GRAPH_EVENT_TYPE_PUBLISHED,
                                                    v1::GRAPH_EVENT_TYPE_PINNED, v1::GRAPH_EVENT_TYPE_UNPINNED};
    std::size_t num_found = 0;
    std::uint64_t sequence = 0;
    GraphWatch watch = client->watch_graphs(0);
    for (const v1::GraphEvent& event : watch) {
        EXPECT_GT(event.sequence(), sequence);
        sequence = event.sequence();
        if (event.graph().name() == graph.name() && event.type() == wanted[num_found]) ++num_found;
        if (num_found == wanted.size()) break;
    }
    watch.cancel();
    EXPECT_THROW(while (watch.next()){}, CancelledError);
    testing::passed("graphs");
}

// Grpc.health.v1 tells SERVING, and NOT_FOUND of a service it does not know.
TEST_F(Interop, Health) {
    EXPECT_EQ(client->check_health(), Health::serving);
    HealthWatch watch = client->watch_health("hotgraph.v1.InferenceService");
    EXPECT_EQ(watch.next(), Health::serving);
    refusal([&] { client->check_health("none"); }, StatusCode::NOT_FOUND, v1::ERROR_REASON_SERVICE_NOT_FOUND);
    testing::passed("health");
}

// A unary call and a stream.
void expect_answers(const Client& client) {
    const auto answer = client.complete(greedy("hello", 2), kPatience);
    const auto streamed = client.generate(greedy("hello", 2)).result();
    EXPECT_EQ(ids_of(answer.choices(0)), ids_of(streamed.choices(0)));
}

void expect_refused(const Client& client, StatusCode code, v1::ErrorReason reason = v1::ERROR_REASON_UNSPECIFIED) {
    refusal([&] { client.complete(greedy("hello", 1), kPatience); }, code, reason);
}

// The same over TCP.
TEST_F(Interop, Tcp) {
    expect_answers(Client(told.tcp));
    expect_answers(Client("ipv4:127.0.0.1:1," + told.tcp));  // nobody listens at the first address
    testing::passed("tcp");
}

// Over TLS with a CA of one's own; not without it.
TEST_F(Interop, TlsWithAnOwnAuthority) {
    ClientOptions options = once();
    options.token = told.tls.token;
    options.tls = Tls::from_files(told.tls.roots);
    expect_answers(Client(told.tls.target, options));
    options.tls = Tls();
    expect_refused(Client(told.tls.target, options), StatusCode::UNAVAILABLE);
    options.tls.reset();
    expect_refused(Client(told.tls.target, options), StatusCode::UNAVAILABLE);
    testing::passed("tls");
}

// With a bearer token; without one or with a wrong one UNAUTHENTICATED.
TEST_F(Interop, Token) {
    ClientOptions options = once();
    options.tls = Tls::from_files(told.tls.roots);
    expect_refused(Client(told.tls.target, options), StatusCode::UNAUTHENTICATED, v1::ERROR_REASON_UNAUTHENTICATED);
    options.token = "wrong";
    expect_refused(Client(told.tls.target, options), StatusCode::UNAUTHENTICATED, v1::ERROR_REASON_UNAUTHENTICATED);
    int num_asked = 0;
    options.token_source = [&] { return ++num_asked, told.tls.token; };
    expect_answers(Client(told.tls.target, options));
    EXPECT_EQ(num_asked, 2);
    testing::passed("token");
}

// Over mutual TLS with a client certificate; not without one.
TEST_F(Interop, MutualTls) {
    const auto& mutual = told.mutual_tls;
    ClientOptions options = once();
    options.tls = Tls::from_files(mutual.roots, mutual.chain, mutual.key);
    expect_answers(Client(mutual.target, options));
    options.tls = Tls::from_files(mutual.roots);
    expect_refused(Client(mutual.target, options), StatusCode::UNAVAILABLE);
    testing::passed("mutual_tls");
}

// A seeded generation, and what it gives unbroken.
class InteropResume : public Interop {
  protected:
    void SetUp() override {
        Interop::SetUp();
        if (IsSkipped()) return;
        request = greedy("Once upon a time", 64);
        request.mutable_sampling()->set_seed(7);
        request.mutable_sampling()->set_temperature(0.9F);
        whole = client->generate(request).result();
    }

    void expect_same(Generation& generation) const {
        const auto answer = generation.result();
        EXPECT_GT(generation.num_resumes(), 0) << "the stream was not broken";
        EXPECT_EQ(ids_of(answer.choices(0)), ids_of(whole.choices(0)));
        EXPECT_EQ(answer.choices(0).text(), whole.choices(0).text());
        EXPECT_EQ(answer.usage().completion_tokens(), whole.usage().completion_tokens());
    }

    v1::GenerateRequest request;
    v1::CompleteResponse whole;
};

// A stream whose connection is cut goes on over a new one: the tokens of an unbroken stream.
TEST_F(InteropResume, Cut) {
    GenerateOptions patient;
    patient.resume_policy.emplace().max_losses = 64;
    Generation generation = Client(told.cut).generate(request, patient);
    expect_same(generation);

    GenerateOptions never;
    never.resume = Resume::never;
    try {
        Client(told.cut).generate(request, never).result();
        ADD_FAILURE() << "nothing was lost";
    } catch (const LostError& lost) {
        EXPECT_TRUE(lost.started());
        EXPECT_GT(lost.choices().at(0).token_ids_size(), 0);
    }
    wait_free(*client);
    testing::passed("cut_and_resume");
}

// A stream cut between the server's headers and its first event is asked for again, as often as allowed.
TEST_F(InteropResume, HeadersCut) {
    v1::GenerateRequest named = request;
    named.set_request_id("cut");
    Generation generation = Client(told.headers_cut).generate(named);
    const auto answer = generation.result();
    EXPECT_EQ(answer.request_id(), "cut/resume-2");
    EXPECT_EQ(generation.num_resumes(), 0);
    EXPECT_EQ(ids_of(answer.choices(0)), ids_of(whole.choices(0)));

    GenerateOptions never;
    never.resume = Resume::never;
    try {
        Client(told.headers_cut).generate(request, never).result();
        ADD_FAILURE() << "not cut";
    } catch (const RetryableError& error) {
        EXPECT_EQ(error.code(), StatusCode::UNAVAILABLE);
    }

    v1::GenerateRequest drawn;
    drawn.set_text("Once upon a time");
    drawn.set_max_tokens(4);
    drawn.set_request_id("drawn");
    GenerateOptions once;
    once.resume_policy.emplace().max_losses = 1;
    EXPECT_EQ(Client(told.headers_cut).generate(drawn, once).result().request_id(), "drawn/resume-1");
    wait_free(*client);
    testing::passed("headers_cut");
}

// A stream whose daemon drains goes on at the next one: the tokens of an unbroken stream.
TEST_F(InteropResume, Drain) {
    const Client drained(told.handover.drained);
    Generation generation = Client(told.handover.target).generate(request);
    bool is_drained = false;
    for (const auto& event : generation) {
        if (!event.has_tokens() || is_drained) continue;
        is_drained = true;
        v1::DrainRequest drain;
        drain.mutable_grace()->set_nanos(300000000);
        const auto answer = drained.call(&Admin::Drain, drain);
        EXPECT_EQ(answer.state(), v1::DAEMON_STATE_DRAINING);
        EXPECT_EQ(answer.num_requests(), 1u);
    }
    expect_same(generation);
    testing::passed("drain_and_resume");
}

// 200 calls on one channel and one on each of 20 channels all succeed.
TEST_F(Interop, Soak) {
    v1::DetokenizeRequest request;
    request.add_token_ids(504);
    request.add_token_ids(6376);
    const auto call = [&](const Client& by) { EXPECT_FALSE(by.call(&Inference::Detokenize, request).text().empty()); };
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; ++i) {
        threads.emplace_back([&] {
            for (int k = 0; k < 25; ++k) EXPECT_NO_THROW(call(*client));
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < 20; ++i) call(Client(told.unix_socket, once()));
    testing::passed("soak");
}

}  // namespace
}  // namespace hotgraph
