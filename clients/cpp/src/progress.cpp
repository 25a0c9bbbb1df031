#include "progress.hpp"

#include <algorithm>
#include <random>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace hotgraph {
namespace {

constexpr std::size_t kMaxRequestIdLength = 128;
// How gRPC's own message begins when no connection could be made: no request left, and gRPC has tried as often as it
// may. Were the words others one day, a server that is not there would be told of later, by max_losses rounds of tries;
// no more.
constexpr std::string_view kNotReached[] = {"failed to connect to all addresses", "DNS resolution failed"};
constexpr std::uint32_t kMaxChoices = 1024;  // more than a server takes; it says so

const std::map<State, std::set<State>> kTransitions = {
    {State::fresh, {State::open, State::ended}},
    {State::open, {State::lost, State::ended}},
    {State::lost, {State::open, State::ended}},
    {State::ended, {}},
};

double random_between(double low, double high) {
    thread_local std::mt19937_64 generator{std::random_device{}()};
    return std::uniform_real_distribution<double>(low, high)(generator);
}

void set_duration(google::protobuf::Duration& target, std::chrono::nanoseconds value) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(value);
    target.set_seconds(seconds.count());
    target.set_nanos(static_cast<std::int32_t>((value - seconds).count()));
}

// Whether the same request gives the same tokens again by itself: greedy, or with a seed.
bool is_repeatable(const v1::GenerateRequest& request) {
    const v1::SamplingParams& sampling = request.sampling();
    return sampling.has_seed() || (sampling.has_temperature() && sampling.temperature() == 0);
}

std::chrono::nanoseconds scaled(std::chrono::nanoseconds value, double factor) {
    return std::chrono::nanoseconds(static_cast<std::int64_t>(static_cast<double>(value.count()) * factor));
}

}  // namespace

Failure own_failure(grpc::StatusCode code, std::string message) {
    Failure failure;
    failure.code = code;
    failure.message = std::move(message);
    return failure;
}

bool is_loss(const Failure& failure, bool is_reached) {
    const Kind kind = failure.kind();
    if (kind == Kind::cancelled) return true;  // not by us: something between us and the server let go
    if (!failure.reason_name.empty()) return is_reached && kind == Kind::retryable;
    if (failure.code == grpc::StatusCode::UNAVAILABLE) return is_reached || is_dropped(failure);
    // Before an answer gRPC has tried again already.
    if (failure.code == grpc::StatusCode::RESOURCE_EXHAUSTED) return is_reached;
    return kind != Kind::request && kind != Kind::deadline;
}

bool is_dropped(const Failure& failure) {
    if (!failure.reason_name.empty() || failure.code != grpc::StatusCode::UNAVAILABLE) return false;
    return std::none_of(std::begin(kNotReached), std::end(kNotReached),
                        [&](std::string_view words) { return failure.message.compare(0, words.size(), words) == 0; });
}

Progress::Progress(v1::GenerateRequest request, Resume resume, ResumePolicy policy, std::optional<Time> deadline)
    : uniform(random_between),
      request_(std::move(request)),
      resume_(resume),
      policy_(policy),
      deadline_(deadline),
      began_(Clock::now()) {
    const std::uint32_t num_choices = request_.has_num_choices() ? request_.num_choices() : 1;
    for (std::uint32_t index = 0; index < std::min(num_choices, kMaxChoices); ++index) record(index);
}

Progress::Record& Progress::record(std::uint32_t index) {
    Record& found = records_[index];
    found.choice.set_index(index);
    return found;
}

bool Progress::has_tokens() const {
    return std::any_of(records_.begin(), records_.end(),
                       [](const auto& entry) { return entry.second.choice.token_ids_size() > 0; });
}

std::string Progress::text() const {
    const auto first = records_.find(0);
    return first == records_.end() ? "" : first->second.choice.text();
}

std::vector<v1::Choice> Progress::choices() const {
    std::vector<v1::Choice> found;
    for (const auto& [index, record] : records_) found.push_back(record.choice);
    return found;
}

v1::CompleteResponse Progress::completion() const {
    if (!started_ || !finished_) throw std::logic_error("the generation has not finished");
    v1::CompleteResponse whole;
    whole.set_request_id(started_->request_id());
    whole.set_model(started_->model());
    whole.set_seed(started_->seed());
    for (const auto& [index, record] : records_) *whole.add_choices() = record.choice;
    if (finished_->has_usage()) *whole.mutable_usage() = finished_->usage();
    if (finished_->has_timings()) *whole.mutable_timings() = finished_->timings();
    if (finished_->has_receipt()) *whole.mutable_receipt() = finished_->receipt();
    return whole;
}

v1::GenerateRequest Progress::open() {
    if (deadline_ && *deadline_ <= now()) {
        fail(own_failure(grpc::StatusCode::DEADLINE_EXCEEDED, "the deadline passed"));
    }
    move(State::open);
    is_connection_answered_ = has_connection_tokens_ = false;
    ++num_connections_;
    ended_before_.clear();
    for (const auto& [index, record] : records_) {
        if (record.choice.has_finish()) ended_before_.push_back(index);
    }
    return num_connections_ == 1 ? request_ : again();
}

// The request for a connection after the first.
v1::GenerateRequest Progress::again() const {
    v1::GenerateRequest request = request_;
    if (deadline_) set_duration(*request.mutable_timeout(), *deadline_ - now());
    const std::string base = started_ ? started_->request_id() : request.request_id();
    if (!base.empty()) {
        // The id itself may still be in flight on a server that is only half dead.
        const std::string suffix = "/resume-" + std::to_string(num_connections_ - 1);
        request.set_request_id(base.substr(0, kMaxRequestIdLength - suffix.size()) + suffix);
    }
    if (started_) {
        request.set_model(started_->model());
        request.mutable_sampling()->set_seed(started_->seed());
    }
    if (has_tokens()) {
        for (const auto& [index, record] : records_) {
            if (record.choice.has_finish()) continue;
            v1::ResumedChoice& resumed = *request.add_resume();
            resumed.set_index(index);
            *resumed.mutable_token_ids() = record.choice.token_ids();
        }
    }
    return request;
}

std::optional<Progress::Event> Progress::receive(Event message) {
    switch (message.event_case()) {
        case Event::kStarted:
            is_connection_answered_ = true;
            num_failed_attempts_ = 0;
            return take_started(std::move(message));
        case Event::kTokens:
            has_connection_tokens_ = true;
            take_tokens(message.tokens());
            return message;
        case Event::kFinished:
            return finish(merged(std::move(*message.mutable_finished())));
        default:
            return message;
    }
}

std::optional<Progress::Event> Progress::take_started(Event message) {
    const v1::Started& other = message.started();
    if (!started_) {
        started_ = other;
        return message;
    }
    if (started_->model() != other.model() || started_->seed() != other.seed() ||
        started_->prompt_tokens() != other.prompt_tokens()) {
        fail_with(lost("the server that answered again has another model, prompt or seed", std::nullopt));
    }
    ++num_resumes_;
    return std::nullopt;
}

void Progress::take_tokens(const v1::Tokens& tokens) {
    Record& into = record(tokens.choice_index());
    if (tokens.token_ids_size() > 0) {
        into.last = now();
        if (into.choice.token_ids_size() == 0) into.first = into.last;
    }
    into.choice.mutable_token_ids()->MergeFrom(tokens.token_ids());
    into.choice.mutable_text()->append(tokens.text());
    into.choice.mutable_logprobs()->MergeFrom(tokens.logprobs());
    if (tokens.has_finish()) *into.choice.mutable_finish() = tokens.finish();
}

Progress::Loss Progress::lose(const std::optional<Failure>& cause) {
    const bool is_answered = started_.has_value();
    if (cause && !is_loss(*cause, is_answered || num_connections_ > 1)) fail(*cause);
    if (is_answered && are_all_finished()) return {std::chrono::nanoseconds(0), finish(finished_alone())};
    const bool is_own_word = cause && !cause->reason_name.empty() && cause->kind() == Kind::retryable;
    const bool is_lost = !cause || (is_answered && !is_own_word);
    const bool is_taken = is_connection_answered_ || (!is_answered && cause && is_dropped(*cause));
    ++(is_taken ? num_losses_ : num_failed_attempts_);
    const std::chrono::nanoseconds wait = delay(cause);
    const bool is_in_time = !deadline_ || now() + wait < *deadline_;
    if (!may_resume() || !is_in_time) {
        fail_with(is_lost ? lost("the server was lost in the middle of an answer", cause) : error_of(*cause));
    }
    move(State::lost);
    return {wait, std::nullopt};
}

bool Progress::are_all_finished() const {
    return std::all_of(records_.begin(), records_.end(),
                       [](const auto& entry) { return entry.second.choice.has_finish(); });
}

bool Progress::may_resume() const {
    if (num_losses_ > policy_.max_losses || num_failed_attempts_ >= policy_.max_attempts) return false;
    switch (resume_) {
        case Resume::always:
            return true;
        case Resume::never:
            return false;
        case Resume::repeatable:
            break;
    }
    // Before any token there is nothing that a second try could contradict.
    return is_repeatable(request_) || !has_tokens();
}

std::chrono::nanoseconds Progress::delay(const std::optional<Failure>& cause) const {
    std::chrono::nanoseconds backoff = std::min(policy_.first_backoff, policy_.max_backoff);
    for (int i = 0; i < num_failed_attempts_ && backoff < policy_.max_backoff; ++i) {
        backoff = std::min(2 * backoff, policy_.max_backoff);
    }
    const auto told = cause ? cause->retry_after.value_or(std::chrono::nanoseconds(0)) : std::chrono::nanoseconds(0);
    // Never before the time told, and not all clients of one server at once.
    return std::max(scaled(backoff, uniform(0.5, 1.5)), scaled(told, uniform(1, 1.25)));
}

std::exception_ptr Progress::lost(std::string message, const std::optional<Failure>& cause) const {
    Failure failure = own_failure(grpc::StatusCode::UNAVAILABLE, std::move(message));
    if (cause) {
        failure.code = cause->code;
        failure.message += ": " + cause->message;
    }
    if (started_) failure.request_id = started_->request_id();
    return std::make_exception_ptr(LostError(std::move(failure), started_, choices()));
}

// Finished as one unbroken call would have told it: choices and tokens of earlier connections count.
v1::Finished Progress::merged(v1::Finished finished) {
    for (const v1::ChoiceFinish& finish : finished.choices()) {
        *record(finish.choice_index()).choice.mutable_finish() = finish;
    }
    finished.clear_choices();
    for (const auto& [index, record] : records_) {
        if (record.choice.has_finish()) *finished.add_choices() = record.choice.finish();
    }
    std::uint32_t num_tokens = finished.usage().completion_tokens();
    for (const std::uint32_t index : ended_before_) {
        num_tokens += static_cast<std::uint32_t>(records_.at(index).choice.token_ids_size());
    }
    finished.mutable_usage()->set_completion_tokens(num_tokens);
    return finished;
}

// Finished when every choice is whole and only that event was lost. Its timings are this side's.
v1::Finished Progress::finished_alone() const {
    v1::Finished finished;
    std::uint32_t num_tokens = 0;
    const Record* longest = nullptr;
    std::optional<Time> first, last;
    for (const auto& [index, record] : records_) {
        const int num_own = record.choice.token_ids_size();
        *finished.add_choices() = record.choice.finish();
        if (num_own == 0) continue;
        num_tokens += static_cast<std::uint32_t>(num_own);
        if (!longest || num_own > longest->choice.token_ids_size()) longest = &record;
        first = first ? std::min(*first, record.first) : record.first;
        last = last ? std::max(*last, record.last) : record.last;
    }
    finished.mutable_usage()->set_prompt_tokens(started_->prompt_tokens());
    finished.mutable_usage()->set_completion_tokens(num_tokens);
    finished.mutable_receipt();
    v1::Timings& timings = *finished.mutable_timings();
    timings.mutable_queue();
    set_duration(*timings.mutable_total(), now() - began_);
    if (longest) {
        set_duration(*timings.mutable_prefill(), *first - began_);
        set_duration(*timings.mutable_time_to_first_token(), *first - began_);
        set_duration(*timings.mutable_decode(), *last - *first);
        if (const int num_gaps = longest->choice.token_ids_size() - 1; num_gaps > 0) {
            set_duration(*timings.mutable_time_per_output_token(), (longest->last - longest->first) / num_gaps);
        }
    }
    return finished;
}

Progress::Event Progress::finish(v1::Finished finished) {
    finished_ = finished;
    move(State::ended);
    Event event;
    *event.mutable_finished() = std::move(finished);
    return event;
}

void Progress::fail(Failure failure) { fail_with(error_of(std::move(failure))); }

void Progress::end(std::exception_ptr error) {
    move(State::ended);
    error_ = std::move(error);
}

void Progress::fail_with(std::exception_ptr error) {
    end(error);
    std::rethrow_exception(error);
}

void Progress::move(State next) {
    if (kTransitions.at(state_).count(next) == 0) throw std::logic_error("a generation cannot go on from its end");
    state_ = next;
}

}  // namespace hotgraph
