// The errors of calls: their gRPC status and the google.rpc details in it, named for what a caller can do.
#pragma once

#include <grpcpp/support/status.h>

#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hotgraph/v1/error_reason.pb.h"
#include "hotgraph/v1/generation.pb.h"

namespace hotgraph {

// What a caller can do about an error.
enum class Kind {
    internal,   // a mistake of the server's or the connection's; Failure::incident finds it in the server's log
    request,    // mend the request; sending it again changes nothing
    retryable,  // may pass: later, or elsewhere, not before Failure::retry_after
    deadline,   // out of time
    cancelled,  // was cancelled
    exhausted,  // refused by the transport or a proxy, such as a message over a size limit
};

// One wrong field of a request: its path as in the contract, and what is wrong with it.
struct Violation {
    std::string field;
    std::string description;
};

// What an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name.
struct Resource {
    std::string type;
    std::string name;
};

// What is known of a failed call.
struct Failure {
    grpc::StatusCode code = grpc::StatusCode::UNKNOWN;
    std::string message;  // for people
    // Why, for programs. Unspecified when the status is not the daemon's own word but a proxy's or gRPC's, and for a
    // reason that this version does not know, which reason_name tells.
    v1::ErrorReason reason = v1::ERROR_REASON_UNSPECIFIED;
    std::string reason_name;                              // as it was sent
    std::map<std::string, std::string> metadata;          // the numbers behind the message, as text
    std::vector<Violation> violations;                    // all wrong fields
    std::optional<std::chrono::nanoseconds> retry_after;  // when to come back, if the server told
    std::optional<Resource> resource;                     // what was not found
    std::string request_id;                               // as the server knows it

    // By the reason, and by the code when there is none.
    Kind kind() const;
    // Finds an internal error in the server's log; else it is empty.
    std::string incident() const;
};

// Why a call failed: the base of all errors that calls throw.
class Error : public std::runtime_error {
  public:
    explicit Error(Failure failure);

    const Failure& failure() const noexcept { return *failure_; }
    grpc::StatusCode code() const noexcept { return failure_->code; }
    v1::ErrorReason reason() const noexcept { return failure_->reason; }
    const std::vector<Violation>& violations() const noexcept { return failure_->violations; }
    // Whether the same request may succeed later or elsewhere.
    bool is_retryable() const { return failure_->kind() == Kind::retryable; }

  private:
    std::shared_ptr<const Failure> failure_;  // shared: copies of an exception may not throw
};

// One for each kind.
class InternalError : public Error {
    using Error::Error;
};
class RequestError : public Error {
    using Error::Error;
};
class RetryableError : public Error {
    using Error::Error;
};
class DeadlineError : public Error {
    using Error::Error;
};
class CancelledError : public Error {
    using Error::Error;
};
class ExhaustedError : public Error {
    using Error::Error;
};

// A server that was lost in the middle of an answer, when going on elsewhere was off, not possible or in vain. Its code
// is how the connection told it, which depends on what stands between client and server.
class LostError : public Error {
  public:
    LostError(Failure failure, std::optional<v1::Started> started, std::vector<v1::Choice> choices);

    // The first event, when it came.
    const std::optional<v1::Started>& started() const noexcept { return answer_->first; }
    // Every choice as far as it came.
    const std::vector<v1::Choice>& choices() const noexcept { return answer_->second; }

  private:
    std::shared_ptr<const std::pair<std::optional<v1::Started>, std::vector<v1::Choice>>> answer_;
};

// What a client was told cannot work or is not safe. Nothing was sent.
class SetupError : public std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// Reads the details of a status that is not OK. One that cannot be read counts as absent.
Failure failure_of(const grpc::Status& status);

// The error of a failure, of the class of its kind.
std::exception_ptr error_of(Failure failure);

// Throws what a status stands for, unless it is OK: for the stubs, which return statuses.
void check(const grpc::Status& status);

}  // namespace hotgraph
