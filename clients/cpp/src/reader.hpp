// The reading of a generation: progress.hpp's rules on calls of a stub.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "hotgraph/client.hpp"
#include "hotgraph/generation.hpp"
#include "progress.hpp"
#include "stream.hpp"

namespace hotgraph {

class Generation::Reader {
  public:
    // The client's copy keeps the connection.
    Reader(Client client, v1::GenerateRequest request, Resume resume, ResumePolicy policy, Timeout timeout);
    ~Reader();

    std::optional<v1::GenerateResponse> next();
    void cancel();

    // What `ask` gives of the progress, while nobody changes it.
    template <class Ask>
    auto of_progress(Ask ask) const {
        const std::lock_guard lock(mutex_);
        return ask(progress_);
    }

  private:
    using Stream = ServerStream<v1::GenerateResponse>;

    void open();
    std::optional<v1::GenerateResponse> advance();
    void wait_before_open();
    void settle();
    void replace(std::shared_ptr<Stream> stream);
    [[noreturn]] void fail_cancelled();

    const Client client_;
    const std::optional<Clock::time_point> call_deadline_;  // after which gRPC ends the call

    mutable std::mutex mutex_;  // over what follows, but for reads of stream_ by the reading thread
    std::condition_variable is_changed_;
    Progress progress_;
    bool is_cancelled_ = false;
    std::shared_ptr<Stream> stream_;

    std::chrono::nanoseconds wait_{0};  // of the reading thread alone
};

}  // namespace hotgraph
