#include "hotgraph/generation.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "reader.hpp"

namespace hotgraph {
namespace {

constexpr auto kSettleTime = std::chrono::seconds(1);  // how long the status after the last event may take
constexpr auto kGraceTime =
    std::chrono::seconds(2);  // beyond the request's timeout, for the server to tell that it passed
constexpr auto kLongest = std::chrono::hours(24 * 365);  // what is longer is no limit; sums of it do not overflow

using Time = Clock::time_point;

std::optional<Time> earlier(std::optional<Time> a, std::optional<Time> b) {
    return a && b ? std::min(*a, *b) : a ? a : b;
}

std::optional<Time> after(Timeout timeout) {
    if (!timeout || *timeout > kLongest) return std::nullopt;
    return Clock::now() + *timeout;
}

// The end by GenerateRequest.timeout; a timeout that is not positive is for the server to refuse.
std::optional<Time> end_of(const v1::GenerateRequest& request) {
    const auto seconds = std::chrono::seconds(request.timeout().seconds());
    if (!request.has_timeout() || seconds > kLongest) return std::nullopt;
    const auto timeout = seconds + std::chrono::nanoseconds(request.timeout().nanos());
    return timeout.count() > 0 ? after(timeout) : std::nullopt;
}

std::optional<Time> with_grace(std::optional<Time> end) {
    return end ? std::optional(*end + kGraceTime) : std::nullopt;
}

}  // namespace

Generation::Reader::Reader(Client client, v1::GenerateRequest request, Resume resume, ResumePolicy policy,
                           Timeout timeout)
    : client_(std::move(client)),
      call_deadline_(earlier(after(timeout), with_grace(end_of(request)))),
      progress_(request, resume, policy, earlier(after(timeout), end_of(request))) {
    open();
}

Generation::Reader::~Reader() {
    if (progress_.finished()) settle();
}

// Begins the next connection. What goes wrong there is told by the first read; it throws when the time is over, and
// what the token's source throws.
void Generation::Reader::open() {
    v1::GenerateRequest request;
    {
        const std::lock_guard lock(mutex_);
        request = progress_.open();
    }
    auto stream = std::make_shared<Stream>();
    client_.prepare(stream->context, std::nullopt, request.session_key());
    if (call_deadline_) {
        const auto left = std::chrono::duration_cast<std::chrono::microseconds>(*call_deadline_ - Clock::now());
        stream->context.set_deadline(std::chrono::system_clock::now() + left);
    }
    stream->start(client_.inference().PrepareAsyncGenerate(&stream->context, request, &stream->queue));
    replace(std::move(stream));
}

// The stream before ends here, outside of the lock: its end waits for gRPC.
void Generation::Reader::replace(std::shared_ptr<Stream> stream) {
    const std::lock_guard lock(mutex_);
    stream_.swap(stream);
    if (is_cancelled_ && stream_) stream_->context.TryCancel();
}

std::optional<v1::GenerateResponse> Generation::Reader::next() {
    try {
        for (;;) {
            switch (of_progress([](const Progress& p) { return p.state(); })) {
                case State::ended:
                    if (progress_.error()) std::rethrow_exception(progress_.error());
                    settle();
                    return std::nullopt;
                case State::lost:
                    wait_before_open();
                    open();
                    break;
                case State::fresh:
                case State::open:
                    if (auto event = advance()) return event;
            }
        }
    } catch (...) {
        {
            const std::lock_guard lock(mutex_);
            // The token's source failed, say: there is no connection to go on with.
            if (progress_.state() != State::ended) progress_.end(std::current_exception());
        }
        replace(nullptr);
        throw;
    }
}

// Reads one message, or takes in that there is none.
std::optional<v1::GenerateResponse> Generation::Reader::advance() {
    const auto idle =
        of_progress([](const Progress& p) { return p.is_idle_bounded() ? p.policy().idle : std::nullopt; });
    v1::GenerateResponse message;
    const Stream::Outcome outcome = stream_->read(message, idle);
    const std::lock_guard lock(mutex_);
    if (outcome == Stream::Outcome::message) return progress_.receive(std::move(message));
    std::optional<Failure> cause;
    if (outcome == Stream::Outcome::idle) {
        const auto idle_ms = std::chrono::duration_cast<std::chrono::milliseconds>(*idle).count();
        cause = own_failure(grpc::StatusCode::UNAVAILABLE, "no event for " + std::to_string(idle_ms) + " ms");
    } else if (!stream_->status().ok()) {
        cause = failure_of(stream_->status());
    }
    if (cause && cause->reason_name.empty()) {
        if (is_cancelled_) fail_cancelled();
        if (call_deadline_ && *call_deadline_ <= Clock::now()) {
            progress_.fail(own_failure(grpc::StatusCode::DEADLINE_EXCEEDED, "the deadline passed"));
        }
    }
    Progress::Loss loss = progress_.lose(cause);
    wait_ = loss.wait;
    return std::move(loss.event);
}

void Generation::Reader::wait_before_open() {
    std::unique_lock lock(mutex_);
    if (is_changed_.wait_for(lock, wait_, [this] { return is_cancelled_; })) fail_cancelled();
}

void Generation::Reader::fail_cancelled() {
    progress_.fail(own_failure(grpc::StatusCode::CANCELLED, "the caller cancelled"));
}

// Lets a finished call end by itself: a cancel now would look to the server as if the caller had left.
void Generation::Reader::settle() {
    if (!stream_) return;
    v1::GenerateResponse message;
    const Time end = Clock::now() + kSettleTime;
    while (stream_->read(message, end - Clock::now()) == Stream::Outcome::message) {
        // Everything is here already; its status is to come.
    }
    replace(nullptr);
}

void Generation::Reader::cancel() {
    const std::lock_guard lock(mutex_);
    // A call that has told all ends by itself.
    if (progress_.state() == State::ended) return;
    is_cancelled_ = true;
    if (stream_) stream_->context.TryCancel();
    is_changed_.notify_all();
}

Generation::Generation(std::unique_ptr<Reader> reader) : reader_(std::move(reader)) {}
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;
Generation::~Generation() = default;

std::optional<v1::GenerateResponse> Generation::next() { return reader_->next(); }

Texts Generation::texts() & { return Texts(*this); }

v1::CompleteResponse Generation::result() {
    while (next()) {
        // The progress keeps it.
    }
    return reader_->of_progress([](const Progress& p) { return p.completion(); });
}

void Generation::cancel() { reader_->cancel(); }

std::optional<v1::Started> Generation::started() const {
    return reader_->of_progress([](const Progress& p) { return p.started(); });
}

std::optional<v1::Finished> Generation::finished() const {
    return reader_->of_progress([](const Progress& p) { return p.finished(); });
}

std::string Generation::text() const {
    return reader_->of_progress([](const Progress& p) { return p.text(); });
}

std::vector<v1::Choice> Generation::choices() const {
    return reader_->of_progress([](const Progress& p) { return p.choices(); });
}

int Generation::num_resumes() const {
    return reader_->of_progress([](const Progress& p) { return p.num_resumes(); });
}

std::optional<std::string> Texts::next() {
    while (auto event = generation_->next()) {
        const v1::Tokens& tokens = event->tokens();
        if (!tokens.text().empty() && tokens.choice_index() == 0) return tokens.text();
    }
    return std::nullopt;
}

}  // namespace hotgraph
