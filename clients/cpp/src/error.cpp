#include "hotgraph/error.hpp"

#include <google/protobuf/any.pb.h>

#include <algorithm>
#include <utility>

#include "hotgraph/wire/wire.pb.h"

namespace hotgraph {
namespace {

constexpr const char* kDomain = "hotgraph";

const char* name_of(grpc::StatusCode code) {
    switch (code) {
        case grpc::StatusCode::OK:
            return "OK";
        case grpc::StatusCode::CANCELLED:
            return "CANCELLED";
        case grpc::StatusCode::INVALID_ARGUMENT:
            return "INVALID_ARGUMENT";
        case grpc::StatusCode::DEADLINE_EXCEEDED:
            return "DEADLINE_EXCEEDED";
        case grpc::StatusCode::NOT_FOUND:
            return "NOT_FOUND";
        case grpc::StatusCode::ALREADY_EXISTS:
            return "ALREADY_EXISTS";
        case grpc::StatusCode::PERMISSION_DENIED:
            return "PERMISSION_DENIED";
        case grpc::StatusCode::UNAUTHENTICATED:
            return "UNAUTHENTICATED";
        case grpc::StatusCode::RESOURCE_EXHAUSTED:
            return "RESOURCE_EXHAUSTED";
        case grpc::StatusCode::FAILED_PRECONDITION:
            return "FAILED_PRECONDITION";
        case grpc::StatusCode::ABORTED:
            return "ABORTED";
        case grpc::StatusCode::OUT_OF_RANGE:
            return "OUT_OF_RANGE";
        case grpc::StatusCode::UNIMPLEMENTED:
            return "UNIMPLEMENTED";
        case grpc::StatusCode::INTERNAL:
            return "INTERNAL";
        case grpc::StatusCode::UNAVAILABLE:
            return "UNAVAILABLE";
        case grpc::StatusCode::DATA_LOSS:
            return "DATA_LOSS";
        default:
            return "UNKNOWN";
    }
}

std::string describe(const Failure& failure) {
    std::string text = name_of(failure.code);
    if (!failure.reason_name.empty()) text += " (" + failure.reason_name + ")";
    return text + ": " + failure.message;
}

// Whether the packed detail is a google.rpc.NAME, whose bytes ours read.
bool is_detail(const google::protobuf::Any& packed, const std::string& name) {
    const std::string& url = packed.type_url();
    return url.substr(url.rfind('/') + 1) == "google.rpc." + name;
}

template <class Detail>
std::optional<Detail> detail_of(const google::protobuf::Any& packed) {
    Detail detail;
    if (!is_detail(packed, Detail::descriptor()->name()) || !detail.ParseFromString(packed.value()))
        return std::nullopt;
    return detail;
}

void read_detail(const google::protobuf::Any& packed, Failure& failure) {
    if (const auto info = detail_of<wire::ErrorInfo>(packed); info && info->domain() == kDomain) {
        failure.reason_name = info->reason();
        failure.metadata.clear();
        failure.metadata.insert(info->metadata().begin(), info->metadata().end());
        if (!v1::ErrorReason_Parse("ERROR_REASON_" + info->reason(), &failure.reason)) {
            failure.reason = v1::ERROR_REASON_UNSPECIFIED;
        }
    } else if (const auto bad = detail_of<wire::BadRequest>(packed)) {
        for (const auto& violation : bad->field_violations()) {
            failure.violations.push_back({violation.field(), violation.description()});
        }
    } else if (const auto retry = detail_of<wire::RetryInfo>(packed)) {
        const std::chrono::nanoseconds told = std::chrono::seconds(retry->retry_delay().seconds()) +
                                              std::chrono::nanoseconds(retry->retry_delay().nanos());
        failure.retry_after = std::max(told, std::chrono::nanoseconds::zero());
    } else if (const auto resource = detail_of<wire::ResourceInfo>(packed)) {
        failure.resource = Resource{resource->resource_type(), resource->resource_name()};
    } else if (const auto request = detail_of<wire::RequestInfo>(packed)) {
        failure.request_id = request->request_id();
    }
}

Kind kind_of(grpc::StatusCode code) {
    switch (code) {
        case grpc::StatusCode::INVALID_ARGUMENT:
        case grpc::StatusCode::NOT_FOUND:
        case grpc::StatusCode::ALREADY_EXISTS:
        case grpc::StatusCode::FAILED_PRECONDITION:
        case grpc::StatusCode::UNIMPLEMENTED:
        case grpc::StatusCode::OUT_OF_RANGE:
        case grpc::StatusCode::UNAUTHENTICATED:
        case grpc::StatusCode::PERMISSION_DENIED:
            return Kind::request;
        case grpc::StatusCode::RESOURCE_EXHAUSTED:
            return Kind::exhausted;
        case grpc::StatusCode::UNAVAILABLE:
        case grpc::StatusCode::ABORTED:
            return Kind::retryable;
        case grpc::StatusCode::DEADLINE_EXCEEDED:
            return Kind::deadline;
        case grpc::StatusCode::CANCELLED:
            return Kind::cancelled;
        default:
            return Kind::internal;
    }
}

}  // namespace

Kind Failure::kind() const {
    switch (reason) {
        case v1::ERROR_REASON_INVALID_REQUEST:
        case v1::ERROR_REASON_MALFORMED_MESSAGE:
        case v1::ERROR_REASON_CONTEXT_LENGTH:
        case v1::ERROR_REASON_MODEL_NOT_FOUND:
        case v1::ERROR_REASON_GRAPH_NOT_FOUND:
        case v1::ERROR_REASON_SERVICE_NOT_FOUND:
        case v1::ERROR_REASON_DUPLICATE_REQUEST:
        case v1::ERROR_REASON_NOT_POSSIBLE:
        case v1::ERROR_REASON_EVENTS_GONE:
        case v1::ERROR_REASON_UNAUTHENTICATED:
        case v1::ERROR_REASON_PERMISSION_DENIED:
        case v1::ERROR_REASON_MESSAGE_TOO_LARGE:
            return Kind::request;
        case v1::ERROR_REASON_QUEUE_FULL:
        case v1::ERROR_REASON_GRAPH_NOT_READY:
        case v1::ERROR_REASON_LOADING:
        case v1::ERROR_REASON_DRAINING:
        case v1::ERROR_REASON_ENGINE_FAILED:
            return Kind::retryable;
        case v1::ERROR_REASON_DEADLINE_EXCEEDED:
        case v1::ERROR_REASON_SERVER_TIME_LIMIT:
            return Kind::deadline;
        case v1::ERROR_REASON_CANCELLED:
            return Kind::cancelled;
        case v1::ERROR_REASON_INTERNAL:
            return Kind::internal;
        default:
            return kind_of(code);
    }
}

std::string Failure::incident() const {
    const auto found = metadata.find("incident");
    return found == metadata.end() ? "" : found->second;
}

Error::Error(Failure failure)
    : std::runtime_error(describe(failure)), failure_(std::make_shared<const Failure>(std::move(failure))) {}

LostError::LostError(Failure failure, std::optional<v1::Started> started, std::vector<v1::Choice> choices)
    : Error(std::move(failure)),
      answer_(std::make_shared<const std::pair<std::optional<v1::Started>, std::vector<v1::Choice>>>(
          std::move(started), std::move(choices))) {}

Failure failure_of(const grpc::Status& status) {
    Failure failure;
    failure.code = status.error_code();
    failure.message = status.error_message();
    wire::Status details;
    if (details.ParseFromString(status.error_details())) {
        for (const auto& packed : details.details()) read_detail(packed, failure);
    }
    return failure;
}

std::exception_ptr error_of(Failure failure) {
    switch (failure.kind()) {
        case Kind::request:
            return std::make_exception_ptr(RequestError(std::move(failure)));
        case Kind::retryable:
            return std::make_exception_ptr(RetryableError(std::move(failure)));
        case Kind::deadline:
            return std::make_exception_ptr(DeadlineError(std::move(failure)));
        case Kind::cancelled:
            return std::make_exception_ptr(CancelledError(std::move(failure)));
        case Kind::exhausted:
            return std::make_exception_ptr(ExhaustedError(std::move(failure)));
        case Kind::internal:
            break;
    }
    return std::make_exception_ptr(InternalError(std::move(failure)));
}

void check(const grpc::Status& status) {
    if (!status.ok()) std::rethrow_exception(error_of(failure_of(status)));
}

}  // namespace hotgraph
