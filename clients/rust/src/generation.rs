//! One generation under way, as a stream of events.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::{Code, Request, Status, Streaming};

use crate::{
    Error, Failure, Resume, ResumePolicy, Transport,
    client::session_value,
    progress::{After, Progress, State},
    v1::{self, generate_response::Event, inference_service_client::InferenceServiceClient},
};

const SETTLE_TIME: Duration = Duration::from_secs(1); // how long the status after the last event may take
const GRACE_TIME: Duration = Duration::from_secs(2); // beyond the request's timeout, for the server to tell that it passed

type Opening = Pin<Box<dyn Future<Output = Result<Streaming<v1::GenerateResponse>, Status>> + Send>>;

/// One generation: Started, Tokens and Finished, as they come. After a lost server it goes on over a new connection without
/// the reader noticing, as [`Resume`] and [`ResumePolicy`] allow.
///
/// It starts when it is first read, by [`Generation::next`], [`Generation::next_text`], [`Generation::result`] or as a
/// [`Stream`]; any of these may be dropped and called again without losing an event. An error is the last item. Dropping the
/// generation, or [`Generation::close`], ends the call, and the server frees its place at the next step.
#[must_use = "a generation starts when it is first read"]
pub struct Generation {
    stub: InferenceServiceClient<Transport>,
    progress: Progress,
    link: Link,
    timeout: Option<Duration>,
    field_timeout: Option<Duration>,
    /// When the call ends, whatever the server does.
    call_end: Option<Instant>,
    session_key: String,
}

#[allow(clippy::large_enum_variant)] // one for each generation
enum Link {
    None,
    Opening(Opening),
    Reading(Streaming<v1::GenerateResponse>, Option<Pin<Box<Sleep>>>),
    Waiting(Pin<Box<Sleep>>),
    /// The last event is here; the call ends by itself: a cancel now would look to the server as if the caller had left.
    Settling(Streaming<v1::GenerateResponse>, Pin<Box<Sleep>>, Event),
    /// An error to tell.
    Failed(Error),
}

impl Generation {
    pub(crate) fn new(
        stub: InferenceServiceClient<Transport>,
        request: v1::GenerateRequest,
        resume: Resume,
        policy: ResumePolicy,
    ) -> Self {
        let field_timeout =
            request.timeout.and_then(|timeout| Duration::try_from(timeout).ok()).filter(|timeout| !timeout.is_zero());
        let session_key = request.session_key.clone();
        let progress = Progress::new(request, resume, policy, Instant::now());
        Self { stub, progress, link: Link::None, timeout: None, field_timeout, call_end: None, session_key }
    }

    /// The deadline of all of it, from the first read on.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// When this one goes on after a lost server, instead of what the client was told.
    pub fn resume(mut self, resume: Resume) -> Self {
        self.progress.resume = resume;
        self
    }

    /// How far this one goes after a lost server, instead of what the client was told.
    pub fn resume_policy(mut self, policy: ResumePolicy) -> Self {
        self.progress.policy = policy;
        self
    }

    /// The next event; None after Finished or an error.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// The next piece of the first choice's text; None after Finished or an error.
    pub async fn next_text(&mut self) -> Option<Result<String, Error>> {
        loop {
            match self.next().await? {
                Ok(Event::Tokens(tokens)) if tokens.choice_index == 0 && !tokens.text.is_empty() => {
                    return Some(Ok(tokens.text));
                }
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Reads what is left: the whole answer, events already read included. After an error that was told, it is cancelled.
    pub async fn result(&mut self) -> Result<v1::CompleteResponse, Error> {
        while let Some(event) = self.next().await {
            event?;
        }
        match self.progress.finished {
            Some(_) => Ok(self.progress.completion()),
            None => Err(cancelled()),
        }
    }

    /// Ends it if it has not ended; the next read then gets [`Error::Cancelled`].
    pub fn close(&mut self) {
        if self.progress.state() != State::Ended {
            self.link = Link::Failed(self.progress.fail(cancelled()));
        }
    }

    /// The first event, when it came.
    pub fn started(&self) -> Option<&v1::Started> {
        self.progress.started.as_ref()
    }

    /// The last event, when it came.
    pub fn finished(&self) -> Option<&v1::Finished> {
        self.progress.finished.as_ref()
    }

    /// Text of the first choice so far.
    pub fn text(&self) -> &str {
        self.progress.text()
    }

    /// Every choice as far as it came.
    pub fn choices(&self) -> Vec<v1::Choice> {
        self.progress.choices()
    }

    /// How often another connection went on so far.
    pub fn num_resumes(&self) -> u32 {
        self.progress.num_resumes
    }

    fn open(&mut self) -> Link {
        let now = Instant::now();
        if self.progress.state() == State::New {
            let end = |timeout: Option<Duration>| timeout.and_then(|timeout| now.checked_add(timeout));
            let (call, field) = (end(self.timeout), end(self.field_timeout));
            self.progress.deadline = earlier(call, field);
            self.call_end = earlier(call, field.map(|field| field + GRACE_TIME));
        }
        let message = match self.progress.open(now) {
            Ok(message) => message,
            Err(error) => return Link::Failed(error),
        };
        let mut request = Request::new(message);
        if let Some(end) = self.call_end {
            request.set_timeout(end.saturating_duration_since(now));
        }
        if let Some(key) = session_value(&self.session_key) {
            request.metadata_mut().insert("session_id", key);
        }
        let mut stub = self.stub.clone();
        Link::Opening(Box::pin(async move { Ok(stub.generate(request).await?.into_inner()) }))
    }

    /// had_headers: the server had begun to answer.
    fn lose(&mut self, cause: Option<Failure>, had_headers: bool) -> Step {
        match self.progress.lose(cause, had_headers, Instant::now()) {
            Ok(After::Wait(wait)) => Step::On(Link::Waiting(Box::pin(sleep(wait)))),
            Ok(After::Event(event)) => Step::Tell(Link::None, Ok(event)),
            Err(error) => Step::On(Link::Failed(error)),
        }
    }

    fn idle_timer(&self) -> Option<Pin<Box<Sleep>>> {
        self.progress.idle().map(|idle| Box::pin(sleep(idle)))
    }

    /// Moves the link on by one step.
    fn step(&mut self, link: Link, cx: &mut Context<'_>) -> Step {
        match link {
            Link::None if self.progress.state() == State::Ended => Step::End,
            Link::None => Step::On(self.open()),
            Link::Opening(mut opening) => match opening.as_mut().poll(cx) {
                Poll::Pending => Step::Wait(Link::Opening(opening)),
                Poll::Ready(Ok(stream)) => Step::On(Link::Reading(stream, None)),
                Poll::Ready(Err(status)) => self.lose(Some(status.into()), false),
            },
            Link::Reading(mut stream, mut idle) => match Pin::new(&mut stream).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => match self.progress.receive(message, Instant::now()) {
                    Ok(Some(event @ Event::Finished(_))) => {
                        Step::On(Link::Settling(stream, Box::pin(sleep(SETTLE_TIME)), event))
                    }
                    Ok(Some(event)) => Step::Tell(Link::Reading(stream, self.idle_timer()), Ok(event)),
                    Ok(None) => Step::On(Link::Reading(stream, self.idle_timer())),
                    Err(error) => Step::On(Link::Failed(error)),
                },
                Poll::Ready(Some(Err(status))) => self.lose(Some(status.into()), true),
                Poll::Ready(None) => self.lose(None, true),
                Poll::Pending if idle.as_mut().is_some_and(|idle| idle.as_mut().poll(cx).is_ready()) => {
                    self.lose(Some(Failure::new(Code::Unavailable, "no event for too long")), true)
                }
                Poll::Pending => Step::Wait(Link::Reading(stream, idle)),
            },
            Link::Waiting(mut wait) => match wait.as_mut().poll(cx) {
                Poll::Pending => Step::Wait(Link::Waiting(wait)),
                Poll::Ready(()) => Step::On(self.open()),
            },
            Link::Settling(mut stream, mut limit, event) => match Pin::new(&mut stream).poll_next(cx) {
                Poll::Ready(Some(Ok(_))) => Step::On(Link::Settling(stream, limit, event)),
                Poll::Pending if limit.as_mut().poll(cx).is_pending() => {
                    Step::Wait(Link::Settling(stream, limit, event))
                }
                _ => Step::Tell(Link::None, Ok(event)), // its status, or none in time; everything is here already
            },
            Link::Failed(error) => Step::Tell(Link::None, Err(error)),
        }
    }
}

#[allow(clippy::large_enum_variant)] // it lives for one step
enum Step {
    On(Link),
    Wait(Link),
    Tell(Link, Result<Event, Error>),
    End,
}

impl Stream for Generation {
    type Item = Result<Event, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let link = std::mem::replace(&mut this.link, Link::None);
            match this.step(link, cx) {
                Step::On(link) => this.link = link,
                Step::Wait(link) => {
                    this.link = link;
                    return Poll::Pending;
                }
                Step::Tell(link, item) => {
                    this.link = link;
                    return Poll::Ready(Some(item));
                }
                Step::End => return Poll::Ready(None),
            }
        }
    }
}

fn cancelled() -> Error {
    Failure::new(Code::Cancelled, "cancelled by the caller").into()
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
