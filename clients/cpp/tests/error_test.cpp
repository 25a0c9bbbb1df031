// What is read of a status.

#include "hotgraph/error.hpp"

#include <gtest/gtest.h>

#include "hotgraph/wire/wire.pb.h"

namespace hotgraph {
namespace {

using namespace std::chrono_literals;

void add(wire::Status& status, const google::protobuf::Message& detail) {
    auto& packed = *status.add_details();
    packed.set_type_url("type.googleapis.com/google.rpc." + detail.GetDescriptor()->name());
    packed.set_value(detail.SerializeAsString());
}

wire::ErrorInfo info(const std::string& reason, const std::string& domain = "hotgraph") {
    wire::ErrorInfo detail;
    detail.set_reason(reason);
    detail.set_domain(domain);
    (*detail.mutable_metadata())["incident"] = "42";
    return detail;
}

// All details of the daemon's errors are found.
TEST(Failure, HasAllDetails) {
    wire::Status status;
    add(status, info("GRAPH_NOT_READY"));
    wire::BadRequest bad;
    bad.add_field_violations()->set_field("text");
    bad.mutable_field_violations(0)->set_description("is empty");
    add(status, bad);
    wire::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(1);
    retry.mutable_retry_delay()->set_nanos(500000000);
    add(status, retry);
    wire::ResourceInfo resource;
    resource.set_resource_type("hotgraph.v1.Graph");
    resource.set_resource_name("graphs/1");
    add(status, resource);
    wire::RequestInfo request;
    request.set_request_id("r");
    add(status, request);
    auto& unknown = *status.add_details();
    unknown.set_type_url("type.googleapis.com/google.rpc.Help");
    auto& broken = *status.add_details();
    broken.set_type_url("type.googleapis.com/google.rpc.RequestInfo");
    broken.set_value("\xff");

    const Failure failure =
        failure_of(grpc::Status(grpc::StatusCode::UNAVAILABLE, "not yet", status.SerializeAsString()));
    EXPECT_EQ(failure.reason, v1::ERROR_REASON_GRAPH_NOT_READY);
    EXPECT_EQ(failure.incident(), "42");
    ASSERT_EQ(failure.violations.size(), 1u);
    EXPECT_EQ(failure.violations[0].field, "text");
    EXPECT_EQ(failure.violations[0].description, "is empty");
    EXPECT_EQ(failure.retry_after, 1500ms);
    ASSERT_TRUE(failure.resource);
    EXPECT_EQ(failure.resource->type + " " + failure.resource->name, "hotgraph.v1.Graph graphs/1");
    EXPECT_EQ(failure.request_id, "r");
    EXPECT_EQ(failure.kind(), Kind::retryable);
    EXPECT_STREQ(Error(failure).what(), "UNAVAILABLE (GRAPH_NOT_READY): not yet");
}

// A proxy's or gRPC's own word has no reason, nor has that of another service; the code tells its kind then.
TEST(Failure, OfOthersHasNoReason) {
    wire::Status status;
    add(status, info("QUEUE_FULL", "example.com"));
    const Failure other =
        failure_of(grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "no", status.SerializeAsString()));
    EXPECT_EQ(other.reason, v1::ERROR_REASON_UNSPECIFIED);
    EXPECT_EQ(other.reason_name, "");
    EXPECT_EQ(other.kind(), Kind::request);
    const Failure garbled = failure_of(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "no", "\xff\xff"));
    EXPECT_EQ(garbled.kind(), Kind::exhausted);
    EXPECT_EQ(garbled.incident(), "");
}

// A reason that this version does not know is told by its name, and its kind by the code.
TEST(Failure, KeepsAnUnknownReason) {
    wire::Status status;
    add(status, info("OF_TOMORROW"));
    const Failure failure = failure_of(grpc::Status(grpc::StatusCode::ABORTED, "no", status.SerializeAsString()));
    EXPECT_EQ(failure.reason, v1::ERROR_REASON_UNSPECIFIED);
    EXPECT_EQ(failure.reason_name, "OF_TOMORROW");
    EXPECT_EQ(failure.kind(), Kind::retryable);
}

// Each reason says what one can do, whatever the code: none is left to it.
TEST(Failure, OfEveryReasonHasAKind) {
    for (int number = 1; number < v1::ErrorReason_ARRAYSIZE; ++number) {
        Failure failure;
        failure.reason = static_cast<v1::ErrorReason>(number);
        failure.code = grpc::StatusCode::RESOURCE_EXHAUSTED;
        EXPECT_NE(failure.kind(), Kind::exhausted) << v1::ErrorReason_Name(failure.reason);
    }
}

// An OK throws nothing, and everything else the class of its kind.
TEST(Check, ThrowsTheClassOfTheKind) {
    EXPECT_NO_THROW(check(grpc::Status::OK));
    EXPECT_THROW(check({grpc::StatusCode::NOT_FOUND, ""}), RequestError);
    EXPECT_THROW(check({grpc::StatusCode::UNAVAILABLE, ""}), RetryableError);
    EXPECT_THROW(check({grpc::StatusCode::DEADLINE_EXCEEDED, ""}), DeadlineError);
    EXPECT_THROW(check({grpc::StatusCode::CANCELLED, ""}), CancelledError);
    EXPECT_THROW(check({grpc::StatusCode::RESOURCE_EXHAUSTED, ""}), ExhaustedError);
    EXPECT_THROW(check({grpc::StatusCode::UNKNOWN, ""}), InternalError);
    EXPECT_THROW(check({grpc::StatusCode::INTERNAL, ""}), Error);
}

}  // namespace
}  // namespace hotgraph
