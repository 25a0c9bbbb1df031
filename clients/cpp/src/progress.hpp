// One generation over as many connections as it takes: what came so far, and what to do when a connection ends. It
// knows messages and time but no channel: generation.cpp opens the calls and reads them.
//
// A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status: what
// stands between client and server changes the code. The exceptions are the daemon's own refusals, errors of the
// request and deadlines. Before the server's headers gRPC's own retries apply (service_config), after them these rules:
// the same request goes out again with the seed that Started told and, for each choice that has not ended, the tokens
// that came. The server goes on from them and sends only what is new, so that ids and texts join without a seam. A call
// whose connection breaks between the headers and the first event gRPC does not try again; nothing came of it, so the
// request goes out as it was.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "hotgraph/error.hpp"
#include "hotgraph/options.hpp"
#include "hotgraph/v1/inference_service.pb.h"

namespace hotgraph {

using Clock = std::chrono::steady_clock;

enum class State {
    fresh,
    open,   // a connection is there, or under way
    lost,   // waits before the next connection
    ended,  // finished, failed or cancelled
};

// Whether a stream that ended with this failure lost its server. is_reached: a server was lost before, or told an
// event.
bool is_loss(const Failure& failure, bool is_reached);

// Whether a connection that was there broke, as far as its failure tells. gRPC tells the same of one that broke before
// the server's headers, when it has tried again already, and of one that broke after them, when it has not; so both
// count, and max_losses bounds them.
bool is_dropped(const Failure& failure);

// A failure that this side found.
Failure own_failure(grpc::StatusCode code, std::string message);

// The record of one generation. Not for several threads at once.
class Progress {
  public:
    using Time = Clock::time_point;
    using Event = v1::GenerateResponse;

    // How it stands after a connection ended: either the last event, when nothing but it was missing, or a wait before
    // open.
    struct Loss {
        std::chrono::nanoseconds wait{0};
        std::optional<Event> event;
    };

    Progress(v1::GenerateRequest request, Resume resume, ResumePolicy policy, std::optional<Time> deadline);

    // What the next connection sends: from fresh or lost to open. Throws DeadlineError when the time is over.
    v1::GenerateRequest open();
    // Takes in what the connection sent: the event for the caller, or none when there is none in it. Throws LostError
    // when the server that goes on would not give the same tokens.
    std::optional<Event> receive(Event message);
    // Takes in that the connection ended before Finished, with this failure or, without one, with OK: from open to
    // lost, or to ended. Throws when the generation cannot go on: the daemon's own error as it is, any other loss after
    // the first event as LostError.
    Loss lose(const std::optional<Failure>& cause);
    // Ends it with this failure, and throws it.
    [[noreturn]] void fail(Failure failure);
    // Ends it with an error that is not the connection's.
    void end(std::exception_ptr error);

    State state() const { return state_; }
    // What it failed with; null when it did not.
    const std::exception_ptr& error() const { return error_; }
    // Whether the next event must come within policy().idle: tokens flow on this connection.
    bool is_idle_bounded() const { return policy_.idle && has_connection_tokens_; }
    const v1::GenerateRequest& request() const { return request_; }
    const ResumePolicy& policy() const { return policy_; }
    const std::optional<v1::Started>& started() const { return started_; }
    const std::optional<v1::Finished>& finished() const { return finished_; }
    int num_resumes() const { return num_resumes_; }
    std::string text() const;
    std::vector<v1::Choice> choices() const;
    // The whole answer, once it has finished.
    v1::CompleteResponse completion() const;

    // Tests put their own in.
    std::function<Time()> now = Clock::now;
    std::function<double(double, double)> uniform;

  private:
    // What came of one choice.
    struct Record {
        v1::Choice choice;
        Time first, last;  // of its tokens
    };

    v1::GenerateRequest again() const;
    std::optional<Event> take_started(Event message);
    void take_tokens(const v1::Tokens& tokens);
    v1::Finished merged(v1::Finished finished);
    v1::Finished finished_alone() const;
    Event finish(v1::Finished finished);
    Record& record(std::uint32_t index);
    bool has_tokens() const;
    bool are_all_finished() const;
    bool may_resume() const;
    std::chrono::nanoseconds delay(const std::optional<Failure>& cause) const;
    std::exception_ptr lost(std::string message, const std::optional<Failure>& cause) const;
    [[noreturn]] void fail_with(std::exception_ptr error);
    void move(State next);

    const v1::GenerateRequest request_;
    const Resume resume_;
    const ResumePolicy policy_;
    const std::optional<Time> deadline_;
    const Time began_;

    State state_ = State::fresh;
    std::optional<v1::Started> started_;
    std::optional<v1::Finished> finished_;
    std::exception_ptr error_;
    int num_resumes_ = 0;
    std::map<std::uint32_t, Record> records_;
    int num_connections_ = 0;
    int num_losses_ = 0;
    int num_failed_attempts_ = 0;  // in a row, without an event
    bool is_connection_answered_ = false;
    bool has_connection_tokens_ = false;
    std::vector<std::uint32_t> ended_before_;  // choices that were whole when this connection began
};

}  // namespace hotgraph
