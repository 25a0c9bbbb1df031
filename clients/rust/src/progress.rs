//! One generation over as many connections as it takes: what came so far, and what to do when a connection ends. It knows
//! messages and time but no channel: generation.rs opens the calls and reads them.
//!
//! A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status: what
//! stands between client and server changes the code. The exceptions are the daemon's own refusals, errors of the request and
//! deadlines. Before the server's headers the retries of transport.rs apply, after them these rules: the same request goes out
//! again with the seed that Started told and, for each choice that has not ended, the tokens that came. The server goes on from
//! them and sends only what is new, so that ids and texts join without a seam. A call whose connection breaks between the headers
//! and the first event the transport does not try again; nothing came of it, so the request goes out as it was.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tonic::Code;

use crate::{
    Error, Failure, Lost,
    error::Kind,
    v1::{self, generate_response::Event},
};

const MAX_REQUEST_ID_LENGTH: usize = 128;
const MAX_CHOICES: u32 = 1024; // more than a server takes; it says so

/// When a generation goes on after a lost server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Resume {
    /// Greedy requests and those with a seed go on, and any other before its first token.
    #[default]
    Repeatable,
    /// Goes on with the seed that the server drew.
    Always,
    /// Leaves it at the retries before an answer.
    Never,
}

/// How far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at random.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResumePolicy {
    /// Servers lost in the middle of one generation, or between their headers and its first event; it bounds what a request
    /// that kills servers can do.
    pub max_losses: u32,
    /// Tries in a row to reach a server again, each of them with the transport's retries.
    pub max_attempts: u32,
    /// The first wait.
    pub first_backoff: Duration,
    /// The longest wait.
    pub max_backoff: Duration,
    /// Makes a stream whose tokens pause for longer count as lost, for paths on which keepalive does not reach the server
    /// itself (a proxy answers it).
    pub idle: Option<Duration>,
}

impl Default for ResumePolicy {
    fn default() -> Self {
        Self {
            max_losses: 3,
            max_attempts: 8,
            first_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            idle: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    New,
    /// A connection is there, or under way.
    Open,
    /// Waits before the next connection.
    Lost,
    /// Finished, failed or cancelled.
    Ended,
}

/// What follows the end of a connection.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // it lives for one step
pub(crate) enum After {
    /// Open the next one then.
    Wait(Duration),
    /// The last event: nothing but it was missing.
    Event(Event),
}

/// What came of one choice.
#[derive(Debug, Default)]
struct Record {
    token_ids: Vec<u32>,
    text: String,
    logprobs: Vec<v1::TokenLogprobs>,
    finish: Option<v1::ChoiceFinish>,
    /// When its first and last tokens came.
    times: Option<(Instant, Instant)>,
}

impl Record {
    fn add(&mut self, tokens: &v1::Tokens, now: Instant) {
        if !tokens.token_ids.is_empty() {
            self.times = Some((self.times.map_or(now, |(first, _)| first), now));
        }
        self.token_ids.extend(&tokens.token_ids);
        self.text.push_str(&tokens.text);
        self.logprobs.extend_from_slice(&tokens.logprobs);
        if tokens.finish.is_some() {
            self.finish.clone_from(&tokens.finish);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Progress {
    request: v1::GenerateRequest,
    pub(crate) resume: Resume,
    pub(crate) policy: ResumePolicy,
    /// When the answer must be whole.
    pub(crate) deadline: Option<Instant>,
    uniform: fn(f64, f64) -> f64,

    state: State,
    began: Instant,
    pub(crate) started: Option<v1::Started>,
    pub(crate) finished: Option<v1::Finished>,
    pub(crate) num_resumes: u32,
    records: BTreeMap<u32, Record>,
    num_connections: u32,
    num_losses: u32,
    /// In a row, without an event.
    num_failed_attempts: u32,
    is_connection_answered: bool,
    has_connection_tokens: bool,
    /// Choices that were whole when this connection began.
    ended_before: Vec<u32>,
}

impl Progress {
    pub(crate) fn new(request: v1::GenerateRequest, resume: Resume, policy: ResumePolicy, now: Instant) -> Self {
        let num_choices = request.num_choices.unwrap_or(1).min(MAX_CHOICES);
        Self {
            request,
            resume,
            policy,
            deadline: None,
            uniform: |low, high| low + (high - low) * fastrand::f64(),
            state: State::New,
            began: now,
            started: None,
            finished: None,
            num_resumes: 0,
            records: (0..num_choices).map(|index| (index, Record::default())).collect(),
            num_connections: 0,
            num_losses: 0,
            num_failed_attempts: 0,
            is_connection_answered: false,
            has_connection_tokens: false,
            ended_before: Vec::new(),
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// How long the next event may take, once tokens flow on this connection.
    pub(crate) fn idle(&self) -> Option<Duration> {
        self.policy.idle.filter(|_| self.has_connection_tokens)
    }

    fn has_tokens(&self) -> bool {
        self.records.values().any(|record| !record.token_ids.is_empty())
    }

    /// Text of the first choice so far.
    pub(crate) fn text(&self) -> &str {
        self.records.get(&0).map_or("", |record| &record.text)
    }

    /// Every choice as far as it came.
    pub(crate) fn choices(&self) -> Vec<v1::Choice> {
        let whole = |(&index, record): (&u32, &Record)| v1::Choice {
            index,
            text: record.text.clone(),
            token_ids: record.token_ids.clone(),
            logprobs: record.logprobs.clone(),
            finish: record.finish.clone(),
        };
        self.records.iter().map(whole).collect()
    }

    /// The whole answer, once it has finished.
    pub(crate) fn completion(&self) -> v1::CompleteResponse {
        let started = self.started.clone().unwrap_or_default();
        let finished = self.finished.clone().unwrap_or_default();
        v1::CompleteResponse {
            request_id: started.request_id,
            model: started.model,
            seed: started.seed,
            choices: self.choices(),
            usage: finished.usage,
            timings: finished.timings,
            receipt: finished.receipt,
        }
    }

    /// What the next connection sends: from new or lost to open. Fails when the time is over.
    pub(crate) fn open(&mut self, now: Instant) -> Result<v1::GenerateRequest, Error> {
        let left = self.deadline.map(|end| end.saturating_duration_since(now));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(self.fail(Failure::new(Code::DeadlineExceeded, "the deadline passed").into()));
        }
        self.go(State::Open);
        self.is_connection_answered = false;
        self.has_connection_tokens = false;
        self.num_connections += 1;
        self.ended_before = self.records.iter().filter(|(_, r)| r.finish.is_some()).map(|(&index, _)| index).collect();
        Ok(if self.num_connections == 1 { self.request.clone() } else { self.again(left) })
    }

    /// The request for a connection after the first.
    fn again(&self, left: Option<Duration>) -> v1::GenerateRequest {
        let mut request = self.request.clone();
        if let Some(left) = left {
            request.timeout = prost_types::Duration::try_from(left).ok();
        }
        if let Some(started) = &self.started {
            request.request_id.clone_from(&started.request_id);
            request.model.clone_from(&started.model);
            request.sampling.get_or_insert_default().seed = Some(started.seed);
        }
        if !request.request_id.is_empty() {
            // The id itself may still be in flight on a server that is only half dead.
            let suffix = format!("/resume-{}", self.num_connections - 1);
            let mut length = request.request_id.len().min(MAX_REQUEST_ID_LENGTH - suffix.len());
            while !request.request_id.is_char_boundary(length) {
                length -= 1;
            }
            request.request_id.truncate(length);
            request.request_id.push_str(&suffix);
        }
        if self.has_tokens() {
            for (&index, record) in self.records.iter().filter(|(_, record)| record.finish.is_none()) {
                request.resume.push(v1::ResumedChoice { index, token_ids: record.token_ids.clone() });
            }
        }
        request
    }

    /// Takes in what the connection sent: the event for the caller, or None when there is none in it. Fails when the server
    /// that goes on would not give the same tokens.
    pub(crate) fn receive(&mut self, message: v1::GenerateResponse, now: Instant) -> Result<Option<Event>, Error> {
        match message.event {
            Some(Event::Started(started)) => {
                self.is_connection_answered = true;
                self.num_failed_attempts = 0;
                self.take_started(started)
            }
            Some(Event::Tokens(tokens)) => {
                self.has_connection_tokens = true;
                self.records.entry(tokens.choice_index).or_default().add(&tokens, now);
                Ok(Some(Event::Tokens(tokens)))
            }
            Some(Event::Finished(finished)) => {
                let whole = self.merge(finished);
                Ok(Some(self.finish(whole)))
            }
            None => Ok(None), // of a newer server
        }
    }

    fn take_started(&mut self, started: v1::Started) -> Result<Option<Event>, Error> {
        let Some(first) = &self.started else {
            self.started = Some(started.clone());
            return Ok(Some(Event::Started(started)));
        };
        let what = |s: &v1::Started| (s.model.clone(), s.seed, s.prompt_tokens);
        if what(first) != what(&started) {
            let lost = self.lost("the server that answered again has another model, prompt or seed", None);
            return Err(self.fail(lost));
        }
        self.num_resumes += 1;
        Ok(None)
    }

    /// Takes in that the connection ended before Finished, with this error or, when it is None, with OK: from open to lost, or
    /// to ended. Fails when the generation cannot go on: with the daemon's own error as it is, with any other loss after the
    /// first event as [`Error::Lost`]. had_headers: the server had begun to answer.
    pub(crate) fn lose(&mut self, cause: Option<Failure>, had_headers: bool, now: Instant) -> Result<After, Error> {
        let is_answered = self.started.is_some();
        let is_reached = is_answered || self.num_connections > 1;
        if let Some(cause) = cause.as_ref().filter(|cause| !is_loss(cause, is_reached, had_headers)) {
            return Err(self.fail(cause.clone().into()));
        }
        if is_answered && self.records.values().all(|record| record.finish.is_some()) {
            let finished = self.finished_alone(now);
            return Ok(After::Event(self.finish(finished)));
        }
        if self.is_connection_answered || !is_answered && had_headers {
            self.num_losses += 1;
        } else {
            self.num_failed_attempts += 1;
        }
        let delay = self.delay(cause.as_ref());
        let is_in_time = self.deadline.is_none_or(|end| now + delay < end);
        if self.may_resume() && is_in_time {
            self.go(State::Lost);
            return Ok(After::Wait(delay));
        }
        let is_own_word = |c: &Failure| !c.reason_name.is_empty() && c.kind() == Kind::Retryable;
        let error = match cause {
            Some(cause) if !is_answered || is_own_word(&cause) => cause.into(),
            cause => self.lost("the server was lost in the middle of an answer", cause),
        };
        Err(self.fail(error))
    }

    fn may_resume(&self) -> bool {
        if self.num_losses > self.policy.max_losses || self.num_failed_attempts >= self.policy.max_attempts {
            return false;
        }
        match self.resume {
            Resume::Always => true,
            Resume::Never => false,
            // Before any token there is nothing that a second try could contradict.
            Resume::Repeatable => is_repeatable(&self.request) || !self.has_tokens(),
        }
    }

    fn delay(&self, cause: Option<&Failure>) -> Duration {
        let doubled = self.policy.first_backoff.saturating_mul(1 << self.num_failed_attempts.min(31));
        let backoff = doubled.min(self.policy.max_backoff).as_secs_f64();
        let told = cause.and_then(|cause| cause.retry_after).unwrap_or_default().as_secs_f64();
        // Never before the time told, and not all clients of one server at once.
        let seconds = (backoff * (self.uniform)(0.5, 1.5)).max(told * (self.uniform)(1.0, 1.25));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(u32::MAX.into()))
    }

    fn lost(&self, message: &str, cause: Option<Failure>) -> Error {
        let mut told = match cause {
            Some(cause) => Failure::new(cause.code, format!("{message}: {}", cause.message)),
            None => Failure::new(Code::Unavailable, message),
        };
        told.request_id = self.started.as_ref().map(|started| started.request_id.clone()).unwrap_or_default();
        Error::Lost(Box::new(Lost { cause: told, started: self.started.clone(), choices: self.choices() }))
    }

    /// Finished as one unbroken call would have told it: choices and tokens of earlier connections count.
    fn merge(&mut self, mut finished: v1::Finished) -> v1::Finished {
        for finish in finished.choices {
            let index = finish.choice_index;
            self.records.entry(index).or_default().finish = Some(finish);
        }
        finished.choices = self.finishes();
        let num_before: usize =
            self.ended_before.iter().filter_map(|index| self.records.get(index)).map(|r| r.token_ids.len()).sum();
        finished.usage.get_or_insert_default().completion_tokens += num_before as u32;
        finished
    }

    fn finishes(&self) -> Vec<v1::ChoiceFinish> {
        self.records.values().filter_map(|record| record.finish.clone()).collect()
    }

    /// Finished when every choice is whole and only that event was lost. Its timings are this side's.
    fn finished_alone(&self, now: Instant) -> v1::Finished {
        let span =
            |from: Instant, to: Instant| prost_types::Duration::try_from(to.saturating_duration_since(from)).ok();
        let mut timings =
            v1::Timings { queue: Some(Default::default()), total: span(self.began, now), ..Default::default() };
        let times = || self.records.values().filter_map(|record| record.times);
        if let (Some(first), Some(last)) = (times().map(|t| t.0).min(), times().map(|t| t.1).max()) {
            timings.prefill = span(self.began, first);
            timings.time_to_first_token = timings.prefill;
            timings.decode = span(first, last);
        }
        let longest = self.records.values().max_by_key(|record| record.token_ids.len());
        if let Some((num_gaps, (first, last))) = longest
            .and_then(|record| record.token_ids.len().checked_sub(1).zip(record.times))
            .filter(|(num_gaps, _)| *num_gaps > 0)
        {
            timings.time_per_output_token = span(first, first + (last - first) / num_gaps as u32);
        }
        let num_tokens: usize = self.records.values().map(|record| record.token_ids.len()).sum();
        v1::Finished {
            choices: self.finishes(),
            usage: Some(v1::Usage {
                prompt_tokens: self.started.as_ref().map_or(0, |started| started.prompt_tokens),
                completion_tokens: num_tokens as u32,
                cached_prompt_tokens: 0,
            }),
            timings: Some(timings),
            receipt: Some(v1::Receipt::default()),
        }
    }

    fn finish(&mut self, finished: v1::Finished) -> Event {
        self.finished = Some(finished.clone());
        self.go(State::Ended);
        Event::Finished(finished)
    }

    /// Ends it with this error.
    pub(crate) fn fail(&mut self, error: Error) -> Error {
        self.go(State::Ended);
        error
    }

    fn go(&mut self, next: State) {
        let is_allowed = match self.state {
            State::New => matches!(next, State::Open | State::Ended),
            State::Open => matches!(next, State::Lost | State::Ended),
            State::Lost => matches!(next, State::Open | State::Ended),
            State::Ended => false,
        };
        assert!(is_allowed, "a generation cannot go from {:?} to {next:?}", self.state); // a mistake of this crate
        self.state = next;
    }
}

/// Whether a stream that ended with this error lost its server. is_reached: a server was lost before, or told an event.
/// had_headers: the server had begun to answer.
fn is_loss(failure: &Failure, is_reached: bool, had_headers: bool) -> bool {
    match failure.kind() {
        Kind::Cancelled => true, // not by us: something between us and the server let go
        kind if !failure.reason_name.is_empty() => is_reached && kind == Kind::Retryable,
        // Before the headers the transport has tried again already.
        _ if failure.code == Code::Unavailable => is_reached || had_headers,
        _ if failure.code == Code::ResourceExhausted => is_reached,
        kind => !matches!(kind, Kind::Request | Kind::Deadline),
    }
}

/// Whether the same request gives the same tokens again by itself: greedy, or with a seed.
fn is_repeatable(request: &v1::GenerateRequest) -> bool {
    request.sampling.as_ref().is_some_and(|sampling| sampling.seed.is_some() || sampling.temperature == Some(0.0))
}

#[cfg(test)]
mod tests {
    use tonic::Status;
    use tonic_types::{ErrorDetails, StatusExt};

    use super::*;

    fn event(event: Event) -> v1::GenerateResponse {
        v1::GenerateResponse { event: Some(event) }
    }

    fn started(seed: u64) -> v1::GenerateResponse {
        event(Event::Started(v1::Started { request_id: "r".into(), model: "m".into(), prompt_tokens: 5, seed }))
    }

    fn tokens(choice_index: u32, finish: Option<v1::ChoiceFinish>, ids: &[u32]) -> v1::GenerateResponse {
        let text = "x".repeat(ids.len());
        event(Event::Tokens(v1::Tokens { choice_index, token_ids: ids.into(), text, finish, ..Default::default() }))
    }

    fn stopped(choice_index: u32) -> v1::ChoiceFinish {
        v1::ChoiceFinish { choice_index, reason: v1::FinishReason::Stop.into(), matched: None }
    }

    fn finished(completion_tokens: u32, choices: Vec<v1::ChoiceFinish>) -> v1::GenerateResponse {
        let usage = Some(v1::Usage { prompt_tokens: 5, completion_tokens, ..Default::default() });
        event(Event::Finished(v1::Finished { choices, usage, ..Default::default() }))
    }

    fn bare(code: Code) -> Failure {
        Failure::new(code, "gone")
    }

    /// The daemon's own word.
    fn told(code: Code, reason: &str, retry_after: Duration) -> Failure {
        let mut details = ErrorDetails::with_error_info(reason, "hotgraph", []);
        details.set_retry_info(Some(retry_after));
        Status::with_error_details(code, "no", details).into()
    }

    fn seeded() -> v1::GenerateRequest {
        v1::GenerateRequest {
            sampling: Some(v1::SamplingParams { seed: Some(7), ..Default::default() }),
            ..Default::default()
        }
    }

    /// A progress whose first connection sent these messages.
    fn begun(request: v1::GenerateRequest, resume: Resume, messages: Vec<v1::GenerateResponse>) -> (Progress, Instant) {
        let now = Instant::now();
        let mut progress = Progress::new(request.clone(), resume, ResumePolicy::default(), now);
        progress.uniform = |low, _| low;
        assert_eq!(progress.open(now).expect("opens"), request);
        for message in messages {
            assert!(progress.receive(message, now).expect("goes well").is_some());
        }
        (progress, now)
    }

    fn waits(progress: &mut Progress, cause: Option<Failure>, now: Instant) -> Duration {
        match progress.lose(cause, true, now).expect("goes on") {
            After::Wait(wait) => wait,
            After::Event(event) => panic!("{event:?}"),
        }
    }

    #[test]
    fn goes_on_with_what_it_has() {
        let request = v1::GenerateRequest { num_choices: Some(3), ..seeded() };
        let came = vec![started(7), tokens(0, None, &[1, 2]), tokens(1, Some(stopped(1)), &[3])];
        let (mut progress, now) = begun(request, Resume::Repeatable, came);
        assert!(!waits(&mut progress, Some(bare(Code::Unavailable)), now).is_zero());
        let again = progress.open(now).expect("opens");
        assert_eq!((again.request_id.as_str(), again.model.as_str()), ("r/resume-1", "m"));
        assert_eq!(again.sampling.expect("a seed").seed, Some(7));
        let resumed: Vec<_> = again.resume.iter().map(|choice| (choice.index, choice.token_ids.as_slice())).collect();
        assert_eq!(resumed, [(0, [1, 2].as_slice()), (2, [].as_slice())]);
        assert!(progress.receive(started(7), now).expect("the same").is_none());
        assert_eq!(progress.num_resumes, 1);
        let Some(Event::Finished(whole)) =
            progress.receive(finished(5, vec![stopped(0), stopped(2)]), now).expect("ends")
        else {
            panic!("not finished");
        };
        assert_eq!((whole.usage.expect("usage").completion_tokens, whole.choices.len()), (6, 3));
    }

    #[test]
    fn knows_what_is_a_loss() {
        let later = Duration::ZERO;
        for (name, failure, is_reached, had_headers, wanted) in [
            ("refused before an answer", bare(Code::Unavailable), false, false, false),
            ("lost after the headers", bare(Code::Unavailable), false, true, true),
            ("a limit after the headers", bare(Code::ResourceExhausted), false, true, false),
            ("lost after it", bare(Code::Unavailable), true, false, true),
            ("a proxy's mistake", bare(Code::Internal), false, false, true),
            ("cancelled by another", bare(Code::Cancelled), false, false, true),
            ("a deadline", bare(Code::DeadlineExceeded), true, true, false),
            ("a wrong request", bare(Code::InvalidArgument), true, true, false),
            ("draining after an answer", told(Code::Unavailable, "DRAINING", later), true, false, true),
            ("draining before", told(Code::Unavailable, "DRAINING", later), false, true, false),
            ("the daemon's own mistake", told(Code::Internal, "INTERNAL", later), true, true, false),
        ] {
            assert_eq!(is_loss(&failure, is_reached, had_headers), wanted, "{name}");
        }
    }

    #[test]
    fn goes_on_as_it_was_after_headers_alone() {
        let request = v1::GenerateRequest { request_id: "mine".into(), ..Default::default() };
        let (mut progress, now) = begun(request.clone(), Resume::Repeatable, vec![]);
        for number in 1..=progress.policy.max_losses {
            waits(&mut progress, Some(bare(Code::Unavailable)), now);
            let again = progress.open(now).expect("opens");
            assert_eq!(again, v1::GenerateRequest { request_id: format!("mine/resume-{number}"), ..request.clone() });
        }
        // What the connection told, as it is.
        let told = progress.lose(Some(bare(Code::Unavailable)), true, now);
        assert!(matches!(told, Err(Error::Retryable(_))), "{told:?}");
        let (mut progress, now) = begun(request.clone(), Resume::Never, vec![]);
        assert!(progress.lose(Some(bare(Code::Unavailable)), true, now).is_err());
        // A server that was lost before is waited for.
        let (mut progress, now) = begun(request, Resume::Repeatable, vec![]);
        waits(&mut progress, Some(bare(Code::Unavailable)), now);
        progress.open(now).expect("opens");
        assert!(progress.lose(Some(bare(Code::Unavailable)), false, now).is_ok());
    }

    #[test]
    fn goes_on_only_as_it_may() {
        let drawn = v1::GenerateRequest::default;
        for (request, resume, goes_on) in [
            (drawn(), Resume::Repeatable, false),
            (drawn(), Resume::Always, true),
            (seeded(), Resume::Repeatable, true),
            (seeded(), Resume::Never, false),
        ] {
            let (mut progress, now) = begun(request, resume, vec![started(7), tokens(0, None, &[1])]);
            match progress.lose(None, true, now) {
                Ok(_) => assert!(goes_on, "{resume:?}"),
                Err(Error::Lost(lost)) => {
                    assert!(!goes_on, "{resume:?}");
                    assert_eq!(
                        (lost.choices[0].token_ids.as_slice(), lost.cause.code),
                        ([1].as_slice(), Code::Unavailable)
                    );
                }
                Err(error) => panic!("{error}"),
            }
        }
        // Before any token there is nothing to contradict.
        let (mut progress, now) = begun(drawn(), Resume::Repeatable, vec![started(7)]);
        waits(&mut progress, None, now);
    }

    #[test]
    fn bounds_losses_and_attempts() {
        let came = || vec![started(7), tokens(0, None, &[1])];
        let (mut progress, now) = begun(seeded(), Resume::Always, came());
        let mut num_losses = 1;
        while progress.lose(Some(bare(Code::Unavailable)), true, now).is_ok() {
            progress.open(now).expect("opens");
            progress.receive(started(7), now).expect("the same");
            num_losses += 1;
        }
        assert_eq!(num_losses, progress.policy.max_losses + 1);

        let (mut progress, now) = begun(seeded(), Resume::Always, came());
        let (mut num_lost, mut last) = (1, Duration::ZERO);
        while let Ok(After::Wait(wait)) = progress.lose(Some(bare(Code::Unavailable)), false, now) {
            assert!(wait >= last && wait <= progress.policy.max_backoff, "{wait:?} after {last:?}");
            last = wait;
            progress.open(now).expect("opens");
            num_lost += 1;
        }
        assert_eq!(num_lost, progress.policy.max_attempts + 1);
    }

    #[test]
    fn waits_as_long_as_told_and_no_longer_than_the_deadline() {
        let told = || Some(told(Code::Unavailable, "DRAINING", Duration::from_secs(9)));
        let came = || vec![started(7), tokens(0, None, &[1])];
        let (mut progress, now) = begun(seeded(), Resume::Always, came());
        assert!(waits(&mut progress, told(), now) >= Duration::from_secs(9));
        let (mut progress, now) = begun(seeded(), Resume::Always, came());
        progress.deadline = Some(now + Duration::from_secs(5));
        assert!(progress.lose(told(), true, now).is_err_and(|error| error.is_retryable()));
    }

    #[test]
    fn another_seed_is_not_the_same_answer() {
        let (mut progress, now) = begun(seeded(), Resume::Always, vec![started(7), tokens(0, None, &[1])]);
        waits(&mut progress, None, now);
        progress.open(now).expect("opens");
        assert!(matches!(progress.receive(started(8), now), Err(Error::Lost(_))));
    }

    #[test]
    fn makes_the_last_event_when_only_it_was_lost() {
        let came = vec![started(7), tokens(0, Some(stopped(0)), &[1, 2])];
        let (mut progress, now) = begun(seeded(), Resume::Never, came);
        let Ok(After::Event(Event::Finished(finished))) = progress.lose(Some(bare(Code::Unavailable)), true, now)
        else {
            panic!("not finished");
        };
        assert_eq!(finished.usage.expect("usage").completion_tokens, 2);
        assert!(finished.timings.expect("timings").time_per_output_token.is_some());
        assert_eq!(progress.state(), State::Ended);
    }

    #[test]
    fn long_request_ids_stay_valid() {
        let request = v1::GenerateRequest { request_id: "i".repeat(MAX_REQUEST_ID_LENGTH), ..seeded() };
        let (mut progress, now) = begun(request, Resume::Always, vec![]);
        waits(&mut progress, Some(bare(Code::Internal)), now);
        let again = progress.open(now).expect("opens");
        assert_eq!(again.request_id.len(), MAX_REQUEST_ID_LENGTH);
        assert!(again.request_id.ends_with("/resume-1"));
    }
}
