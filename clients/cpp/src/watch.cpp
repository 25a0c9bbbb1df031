#include "hotgraph/watch.hpp"

#include <grpcpp/generic/generic_stub.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "generic.hpp"
#include "hotgraph/client.hpp"
#include "hotgraph/wire/wire.pb.h"
#include "stream.hpp"

namespace hotgraph {

template <class Item>
class Watch<Item>::Reader {
  public:
    virtual ~Reader() = default;
    virtual std::optional<Item> next() = 0;
    virtual void cancel() = 0;
};

namespace {

// A call and its messages; how they become items is told by who derives from it.
template <class Item, class Message, class Call>
class CallReader : public Watch<Item>::Reader {
  public:
    explicit CallReader(Client client) : client_(std::move(client)) { client_.prepare(stream_.context); }

    std::optional<Item> next() override {
        Message message;
        if (stream_.read(message) == Stream::Outcome::message) return decode(message);
        if (is_cancelled_) throw CancelledError(own_failure(grpc::StatusCode::CANCELLED, "the caller cancelled"));
        check(stream_.status());
        return std::nullopt;
    }

    void cancel() override {
        is_cancelled_ = true;
        stream_.context.TryCancel();
    }

  protected:
    using Stream = ServerStream<Message, Call>;

    virtual Item decode(Message& message) const = 0;

    const Client client_;  // keeps the connection
    Stream stream_;

  private:
    std::atomic<bool> is_cancelled_ = false;
};

class GraphReader final
    : public CallReader<v1::GraphEvent, v1::WatchGraphsResponse, grpc::ClientAsyncReader<v1::WatchGraphsResponse>> {
  public:
    GraphReader(const Client& client, std::optional<std::uint64_t> after) : CallReader(client) {
        v1::WatchGraphsRequest request;
        if (after) request.set_after_sequence(*after);
        stream_.start(client_.graphs().PrepareAsyncWatchGraphs(&stream_.context, request, &stream_.queue));
    }

  private:
    v1::GraphEvent decode(v1::WatchGraphsResponse& message) const override {
        return std::move(*message.mutable_event());
    }
};

// gRPC's own health has no stub of ours: see protos/hotgraph/wire/wire.proto.
class HealthReader final : public CallReader<Health, grpc::ByteBuffer, grpc::GenericClientAsyncReaderWriter> {
  public:
    HealthReader(const Client& client, const std::string& service) : CallReader(client), stub_(client_.channel()) {
        wire::HealthCheckRequest request;
        request.set_service(service);
        stream_.start(stub_.PrepareCall(&stream_.context, "/grpc.health.v1.Health/Watch", &stream_.queue),
                      [bytes = packed(request)](grpc::GenericClientAsyncReaderWriter& call, void* tag) {
                          call.WriteLast(bytes, grpc::WriteOptions(), tag);
                      });
    }

  private:
    Health decode(grpc::ByteBuffer& message) const override {
        wire::HealthCheckResponse response;
        unpack(message, response);
        return static_cast<Health>(response.status());
    }

    grpc::GenericStub stub_;
};

}  // namespace

template <class Item>
Watch<Item>::Watch(std::unique_ptr<Reader> reader) : reader_(std::move(reader)) {}
template <class Item>
Watch<Item>::Watch(Watch&&) noexcept = default;
template <class Item>
Watch<Item>& Watch<Item>::operator=(Watch&&) noexcept = default;
template <class Item>
Watch<Item>::~Watch() = default;

template <class Item>
std::optional<Item> Watch<Item>::next() {
    return reader_->next();
}

template <class Item>
void Watch<Item>::cancel() {
    reader_->cancel();
}

template class Watch<v1::GraphEvent>;
template class Watch<Health>;

GraphWatch Client::watch_graphs(std::optional<std::uint64_t> after) const {
    return GraphWatch(std::make_unique<GraphReader>(*this, after));
}

HealthWatch Client::watch_health(const std::string& service) const {
    return HealthWatch(std::make_unique<HealthReader>(*this, service));
}

Health Client::check_health(const std::string& service, Timeout timeout) const {
    wire::HealthCheckRequest request;
    wire::HealthCheckResponse response;
    request.set_service(service);
    call("/grpc.health.v1.Health/Check", request, response, timeout);
    return static_cast<Health>(response.status());
}

}  // namespace hotgraph
