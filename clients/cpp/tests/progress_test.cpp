// The rules of going on after a lost server, without any connection and with a clock that stands still.

#include "progress.hpp"

#include <gtest/gtest.h>

#include <memory>

namespace hotgraph {
namespace {

using namespace std::chrono_literals;
using Event = v1::GenerateResponse;

Event started(std::uint64_t seed) {
    Event event;
    event.mutable_started()->set_request_id("r");
    event.mutable_started()->set_model("m");
    event.mutable_started()->set_prompt_tokens(5);
    event.mutable_started()->set_seed(seed);
    return event;
}

v1::ChoiceFinish stopped(std::uint32_t index) {
    v1::ChoiceFinish finish;
    finish.set_choice_index(index);
    finish.set_reason(v1::FINISH_REASON_STOP);
    return finish;
}

Event tokens(std::uint32_t index, std::initializer_list<std::uint32_t> ids, bool is_last = false) {
    Event event;
    event.mutable_tokens()->set_choice_index(index);
    for (const std::uint32_t id : ids) event.mutable_tokens()->add_token_ids(id);
    event.mutable_tokens()->set_text(std::string(ids.size(), 'x'));
    if (is_last) *event.mutable_tokens()->mutable_finish() = stopped(index);
    return event;
}

Event finished(std::uint32_t num_tokens, std::initializer_list<v1::ChoiceFinish> finishes) {
    Event event;
    for (const v1::ChoiceFinish& finish : finishes) *event.mutable_finished()->add_choices() = finish;
    event.mutable_finished()->mutable_usage()->set_prompt_tokens(5);
    event.mutable_finished()->mutable_usage()->set_completion_tokens(num_tokens);
    return event;
}

Failure bare(grpc::StatusCode code) { return own_failure(code, "gone"); }

// The daemon's own word.
Failure told(grpc::StatusCode code, const std::string& reason, std::chrono::seconds retry_after = 0s) {
    Failure failure = own_failure(code, "no");
    failure.reason_name = reason;
    EXPECT_TRUE(v1::ErrorReason_Parse("ERROR_REASON_" + reason, &failure.reason));
    failure.retry_after = retry_after;
    return failure;
}

v1::GenerateRequest seeded() {
    v1::GenerateRequest request;
    request.mutable_sampling()->set_seed(7);
    return request;
}

// One whose first connection sent these messages; its clock stands still.
std::unique_ptr<Progress> begun(const v1::GenerateRequest& request, Resume resume, std::vector<Event> messages,
                                std::optional<std::chrono::seconds> timeout = {}) {
    const Clock::time_point now = Clock::now();
    auto progress = std::make_unique<Progress>(request, resume, ResumePolicy(),
                                               timeout ? std::optional(now + *timeout) : std::nullopt);
    progress->now = [now] { return now; };
    progress->uniform = [](double low, double) { return low; };
    EXPECT_EQ(progress->open().SerializeAsString(), request.SerializeAsString());
    for (Event& message : messages) EXPECT_TRUE(progress->receive(std::move(message)));
    return progress;
}

// The next connection is asked for what is missing, and the caller sees one unbroken answer.
TEST(Progress, GoesOnWithWhatItHas) {
    v1::GenerateRequest request = seeded();
    request.set_num_choices(3);
    const auto p = begun(request, Resume::repeatable, {started(7), tokens(0, {1, 2}), tokens(1, {3}, true)});
    const Progress::Loss loss = p->lose(bare(grpc::StatusCode::UNAVAILABLE));
    EXPECT_GT(loss.wait, 0s);
    EXPECT_FALSE(loss.event);
    const v1::GenerateRequest again = p->open();
    EXPECT_EQ(again.request_id(), "r/resume-1");
    EXPECT_EQ(again.model(), "m");
    EXPECT_EQ(again.sampling().seed(), 7u);
    ASSERT_EQ(again.resume_size(), 2);
    EXPECT_EQ(again.resume(0).index(), 0u);
    EXPECT_EQ(again.resume(0).token_ids_size(), 2);
    EXPECT_EQ(again.resume(1).index(), 2u);
    EXPECT_FALSE(p->receive(started(7))) << "a second started shows";
    EXPECT_EQ(p->num_resumes(), 1);
    const auto event = p->receive(finished(5, {stopped(0), stopped(2)}));
    ASSERT_TRUE(event);
    EXPECT_EQ(event->finished().usage().completion_tokens(), 6u) << "not as one unbroken call would tell";
    EXPECT_EQ(event->finished().choices_size(), 3);
    EXPECT_EQ(p->completion().choices(0).text(), "xx");
    EXPECT_EQ(p->request().resume_size(), 0);
}

// A later connection gets the time that is left, and none is opened when there is none.
TEST(Progress, AsksForTheTimeThatIsLeft) {
    const auto p = begun(seeded(), Resume::always, {started(7), tokens(0, {1})}, 60s);
    p->lose(std::nullopt);
    const Clock::time_point later = p->now() + 20s;
    p->now = [later] { return later; };
    EXPECT_EQ(p->open().timeout().seconds(), 40);
    p->lose(bare(grpc::StatusCode::INTERNAL));
    p->now = [later] { return later + 41s; };
    EXPECT_THROW(p->open(), DeadlineError);
    EXPECT_EQ(p->state(), State::ended);
}

// Refusals, wrong requests and deadlines are not losses; what may come of the way between is.
TEST(Progress, KnowsWhatIsALoss) {
    const struct {
        const char* name;
        Failure failure;
        bool is_reached, is_loss;
    } cases[] = {
        {"never reached", own_failure(grpc::StatusCode::UNAVAILABLE, "failed to connect to all addresses; last error"),
         false, false},
        {"not resolved", own_failure(grpc::StatusCode::UNAVAILABLE, "DNS resolution failed for x"), false, false},
        {"not reached again", own_failure(grpc::StatusCode::UNAVAILABLE, "failed to connect to all addresses"), true,
         true},
        {"dropped before an answer", bare(grpc::StatusCode::UNAVAILABLE), false, true},
        {"a limit before an answer", bare(grpc::StatusCode::RESOURCE_EXHAUSTED), false, false},
        {"lost after it", bare(grpc::StatusCode::UNAVAILABLE), true, true},
        {"a proxy's limit after it", bare(grpc::StatusCode::RESOURCE_EXHAUSTED), true, true},
        {"a proxy's mistake", bare(grpc::StatusCode::INTERNAL), false, true},
        {"cancelled by another", bare(grpc::StatusCode::CANCELLED), false, true},
        {"a deadline", bare(grpc::StatusCode::DEADLINE_EXCEEDED), true, false},
        {"a wrong request", bare(grpc::StatusCode::INVALID_ARGUMENT), true, false},
        {"draining after an answer", told(grpc::StatusCode::UNAVAILABLE, "DRAINING"), true, true},
        {"draining before", told(grpc::StatusCode::UNAVAILABLE, "DRAINING"), false, false},
        {"the daemon's own mistake", told(grpc::StatusCode::INTERNAL, "INTERNAL"), true, false},
    };
    for (const auto& c : cases) EXPECT_EQ(is_loss(c.failure, c.is_reached), c.is_loss) << c.name;
}

// It goes on where the answer can be repeated or the caller said so, and tells what came where it does not.
TEST(Progress, DoesNotAlwaysGoOn) {
    v1::GenerateRequest greedy;
    greedy.mutable_sampling()->set_temperature(0);
    const struct {
        const char* name;
        v1::GenerateRequest request;
        Resume resume;
        bool goes_on;
    } cases[] = {
        {"a drawn seed", {}, Resume::repeatable, false}, {"a drawn seed, always", {}, Resume::always, true},
        {"a seed", seeded(), Resume::repeatable, true},  {"a seed, never", seeded(), Resume::never, false},
        {"greedy", greedy, Resume::repeatable, true},
    };
    for (const auto& c : cases) {
        SCOPED_TRACE(c.name);
        const auto p = begun(c.request, c.resume, {started(7), tokens(0, {1})});
        try {
            p->lose(std::nullopt);
            EXPECT_TRUE(c.goes_on);
        } catch (const LostError& lost) {
            EXPECT_FALSE(c.goes_on);
            EXPECT_EQ(lost.code(), grpc::StatusCode::UNAVAILABLE);
            EXPECT_TRUE(lost.started());
            ASSERT_EQ(lost.choices().size(), 1u);
            EXPECT_EQ(lost.choices()[0].token_ids(0), 1u);
        }
    }
    const auto p = begun({}, Resume::repeatable, {started(7)});
    EXPECT_NO_THROW(p->lose(std::nullopt)) << "before any token there is nothing to contradict";
}

// When nothing came the request goes out as it was, for as many servers as the policy allows.
TEST(Progress, GoesOnAsItWasBeforeTheFirstEvent) {
    v1::GenerateRequest request;
    request.set_request_id("mine");
    const Failure gone = bare(grpc::StatusCode::UNAVAILABLE);
    const auto p = begun(request, Resume::repeatable, {});
    for (int i = 1; i <= p->policy().max_losses; ++i) {
        EXPECT_GT(p->lose(gone).wait, 0s);
        v1::GenerateRequest again = p->open();
        EXPECT_EQ(again.request_id(), "mine/resume-" + std::to_string(i));
        again.set_request_id("mine");
        EXPECT_EQ(again.SerializeAsString(), request.SerializeAsString());
    }
    EXPECT_THROW(p->lose(gone), RetryableError) << "as gRPC said it";
    EXPECT_THROW(begun(request, Resume::never, {})->lose(gone), RetryableError);
    const auto q = begun(request, Resume::repeatable, {});
    q->lose(gone);
    q->open();
    EXPECT_NO_THROW(q->lose(own_failure(grpc::StatusCode::UNAVAILABLE, "failed to connect to all addresses")))
        << "a server that was lost before is waited for";
}

// What the daemon itself says is not dressed up as a lost server.
TEST(Progress, TellsTheDaemonsOwnErrorAsItIs) {
    const auto p = begun(seeded(), Resume::never, {started(7), tokens(0, {1})});
    EXPECT_THROW(p->lose(told(grpc::StatusCode::UNAVAILABLE, "DRAINING")), RetryableError);
    const auto q = begun(seeded(), Resume::always, {started(7), tokens(0, {1})});
    EXPECT_THROW(q->lose(told(grpc::StatusCode::INTERNAL, "INTERNAL")), InternalError);
    EXPECT_TRUE(q->error());
}

// A request that kills servers ends after max_losses of them.
TEST(Progress, BoundsLosses) {
    const auto p = begun(seeded(), Resume::always, {started(7), tokens(0, {1})});
    for (int i = 0; i < p->policy().max_losses; ++i) {
        p->lose(bare(grpc::StatusCode::UNAVAILABLE));
        p->open();
        p->receive(started(7));
    }
    EXPECT_THROW(p->lose(bare(grpc::StatusCode::UNAVAILABLE)), LostError);
}

// Tries in a row are bounded, and the waits between them grow up to the longest.
TEST(Progress, BoundsAttemptsAndWaits) {
    const auto p = begun(seeded(), Resume::always, {started(7), tokens(0, {1})});
    std::chrono::nanoseconds last{0};
    for (int i = 0; i < p->policy().max_attempts; ++i) {
        const auto wait = p->lose(bare(grpc::StatusCode::UNAVAILABLE)).wait;
        EXPECT_GE(wait, last);
        EXPECT_LE(wait, p->policy().max_backoff);
        last = wait;
        p->open();
    }
    EXPECT_THROW(p->lose(bare(grpc::StatusCode::UNAVAILABLE)), LostError);
}

// It comes back no sooner than told, and not at all when that is too late.
TEST(Progress, WaitsAsLongAsToldAndNoLongerThanTheDeadline) {
    const Failure draining = told(grpc::StatusCode::UNAVAILABLE, "DRAINING", 9s);
    const auto p = begun(seeded(), Resume::always, {started(7), tokens(0, {1})});
    EXPECT_GE(p->lose(draining).wait, 9s);
    const auto q = begun(seeded(), Resume::always, {started(7), tokens(0, {1})}, 5s);
    EXPECT_THROW(q->lose(draining), RetryableError);
}

// A server that would give another answer is not gone on with.
TEST(Progress, TakesNoOtherAnswer) {
    const auto p = begun(seeded(), Resume::always, {started(7), tokens(0, {1})});
    p->lose(std::nullopt);
    p->open();
    EXPECT_THROW(p->receive(started(8)), LostError);
}

// When only Finished was lost it is made here.
TEST(Progress, NeedsNoServerForFinishedAlone) {
    const auto p = begun(seeded(), Resume::never, {started(7), tokens(0, {1, 2}, true)});
    const auto event = p->lose(bare(grpc::StatusCode::UNAVAILABLE)).event;
    ASSERT_TRUE(event);
    EXPECT_EQ(event->finished().usage().completion_tokens(), 2u);
    EXPECT_EQ(event->finished().usage().prompt_tokens(), 5u);
    EXPECT_EQ(event->finished().choices_size(), 1);
    EXPECT_TRUE(event->finished().timings().has_time_per_output_token());
    EXPECT_EQ(p->state(), State::ended);
}

// The id of a later try is no longer than the contract lets it be.
TEST(Progress, KeepsLongRequestIdsValid) {
    v1::GenerateRequest request = seeded();
    request.set_request_id(std::string(128, 'i'));
    const auto p = begun(request, Resume::always, {});
    p->lose(bare(grpc::StatusCode::INTERNAL));
    const std::string id = p->open().request_id();
    EXPECT_EQ(id, std::string(119, 'i') + "/resume-1");
}

// A long prefill is no pause; one between tokens is.
TEST(Progress, BoundsPausesOnceTokensFlow) {
    ResumePolicy policy;
    policy.idle = 1s;
    Progress p(seeded(), Resume::always, policy, std::nullopt);
    p.open();
    p.receive(started(7));
    EXPECT_FALSE(p.is_idle_bounded()) << "a long prefill is no pause";
    p.receive(tokens(0, {1}));
    EXPECT_TRUE(p.is_idle_bounded());
}

// After its end nothing can be opened, and what failed has no whole answer.
TEST(Progress, EndsOnce) {
    const auto p = begun(seeded(), Resume::always, {started(7)});
    EXPECT_THROW(p->fail(bare(grpc::StatusCode::CANCELLED)), CancelledError);
    EXPECT_THROW(p->open(), std::logic_error);
    EXPECT_THROW(p->completion(), std::logic_error);
}

}  // namespace
}  // namespace hotgraph
