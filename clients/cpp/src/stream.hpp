// One server-streaming call, read by one thread with time limits. It knows no message and no rule of going on.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/support/async_stream.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

namespace hotgraph {

// A queue of its own for each call, which the reading thread polls: no thread beside it, and each wait can be bounded.
template <class Message, class Reader = grpc::ClientAsyncReader<Message>>
class ServerStream {
  public:
    enum class Outcome { message, ended, idle };

    ServerStream() = default;
    ServerStream(const ServerStream&) = delete;
    ServerStream& operator=(const ServerStream&) = delete;

    ~ServerStream() {
        context.TryCancel();
        if (!is_over_) end();
        queue.Shutdown();
        void* tag = nullptr;
        bool is_ok = false;
        while (queue.Next(&tag, &is_ok)) {
        }
    }

    grpc::ClientContext context;  // prepare it before start; any thread may cancel it
    grpc::CompletionQueue queue;  // for the stub's PrepareAsync

    // One more operation before the first read, with the tag it is given.
    using Send = std::function<void(Reader&, void*)>;

    // Takes what a stub's PrepareAsync gave, and begins the call. It sends the request, or `send` does.
    void start(std::unique_ptr<Reader> reader, Send send = nullptr) {
        reader_ = std::move(reader);
        send_ = std::move(send);
        reader_->StartCall(tag());
        is_started_ = false;
        is_over_ = false;
    }

    // Waits for the next message, for `limit` at most: after that the call is over, and so it is after ended.
    Outcome read(Message& message, std::optional<std::chrono::nanoseconds> limit = std::nullopt) {
        if (is_over_) return Outcome::ended;
        if (!is_started_ && !wait_start()) {
            finish();
            return Outcome::ended;
        }
        reader_->Read(&message, tag());
        bool is_ok = false;
        if (limit && !next_until(is_ok, *limit)) {
            context.TryCancel();
            next(is_ok);
            finish();
            return Outcome::idle;
        }
        if (!limit) next(is_ok);
        if (is_ok) return Outcome::message;
        finish();
        return Outcome::ended;
    }

    // How the call ended; once read has said so.
    const grpc::Status& status() const { return status_; }

  private:
    void* tag() { return this; }  // there is one operation at a time

    void next(bool& is_ok) {
        void* tag = nullptr;
        queue.Next(&tag, &is_ok);
    }

    bool next_until(bool& is_ok, std::chrono::nanoseconds limit) {
        void* tag = nullptr;
        const auto end =
            std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::microseconds>(limit);
        return queue.AsyncNext(&tag, &is_ok, end) == grpc::CompletionQueue::GOT_EVENT;
    }

    bool wait_start() {
        is_started_ = true;
        bool is_ok = false;
        next(is_ok);
        if (is_ok && send_) {
            send_(*reader_, tag());
            next(is_ok);
        }
        return is_ok;
    }

    void finish() {
        is_over_ = true;
        reader_->Finish(&status_, tag());
        bool is_ok = false;
        next(is_ok);
    }

    // After a cancel: what is under way ends at once.
    void end() {
        if (!is_started_) wait_start();
        finish();
    }

    std::unique_ptr<Reader> reader_;
    Send send_;
    grpc::Status status_;
    bool is_started_ = true;
    bool is_over_ = true;  // nothing was started, or it has ended
};

}  // namespace hotgraph
