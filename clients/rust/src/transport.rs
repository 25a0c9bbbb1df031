//! What carries the calls of all stubs: it adds their metadata, holds them to their deadline, and tries again those that were
//! not answered, by the rules that other languages give to gRPC as a service config and tonic does not have. It knows HTTP
//! heads and statuses but no messages.
//!
//! UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, up to `max_attempts` in all, as long as the server sent no head of an
//! answer. The wait is what its `grpc-retry-pushback-ms` says (a negative one ends the tries), else 0.1 s, 0.2 s, 0.4 s with
//! jitter. Throttling: each failure takes one of 20 tokens and each success gives back a fifth of one; at half or less
//! nothing is tried again. EvictGraph is never tried again: a second time it would fail although the first one worked.

use std::{
    error::Error as StdError,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, request::Parts};
use http_body::Frame;
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout_at};
use tonic::{Code, Status, body::Body, transport::Channel};
use tower_service::Service;

const FIRST_BACKOFF_SECONDS: f64 = 0.1;
const MAX_BACKOFF_SECONDS: f64 = 2.0;
const JITTER: f64 = 0.2;
const NOT_RETRIED: &str = "/hotgraph.v1.GraphService/EvictGraph";

pub(crate) type TokenSource = Arc<dyn Fn() -> String + Send + Sync>;

/// Carries calls to a daemon; what the stubs of [`crate::v1`] and of other services are made of. Clones share a connection.
#[derive(Clone)]
pub struct Transport {
    channel: Channel,
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) token: Option<TokenSource>,
    pub(crate) client_id: Option<HeaderValue>,
    pub(crate) max_attempts: u32,
    pub(crate) wait_for_ready: bool,
    pub(crate) throttle: Throttle,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").field("channel", &self.channel).finish_non_exhaustive() // no token
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(())) // each attempt waits for the channel
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

impl Transport {
    pub(crate) fn new(channel: Channel, shared: Shared) -> Self {
        Self { channel, shared: Arc::new(shared) }
    }

    async fn send(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (mut head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes(); // to send it again: no call of the contract streams its request
        self.shared.add_metadata(&mut head.headers)?;
        let deadline = match head.headers.get("grpc-timeout") {
            Some(value) => Some(Instant::now() + parse_timeout(value)?),
            None => None,
        };
        let max_attempts = if head.uri.path() == NOT_RETRIED { 1 } else { self.shared.max_attempts };
        let mut num_attempts = 0;
        let mut num_waits = 0;
        let mut was_unsent = false;
        loop {
            if let Some(end) = deadline {
                head.headers.insert("grpc-timeout", timeout_value(end.saturating_duration_since(Instant::now()))?);
            }
            if num_attempts > 0 {
                head.headers.insert("grpc-previous-rpc-attempts", HeaderValue::from(num_attempts));
            }
            let outcome = within(deadline, self.attempt(head.clone(), message.clone())).await?;
            let refusal = match &outcome {
                Ok(response) => refusal_of(response),
                // A connection that closed just before: nothing was sent, so that this does not count.
                Err(failed) if failed.status.code() == Code::Cancelled && !was_unsent => {
                    was_unsent = true;
                    continue;
                }
                Err(failed) if failed.is_unconnected && self.shared.wait_for_ready => {
                    num_waits += 1;
                    within(deadline, sleep(backoff(num_waits))).await?;
                    continue;
                }
                Err(_) => Some(Refusal { code: Code::Unavailable, pushback: None }),
            };
            num_attempts += 1;
            let wait = refusal.and_then(|refusal| refusal.wait(num_attempts, max_attempts, &self.shared.throttle));
            match (wait, outcome) {
                (Some(wait), _) if deadline.is_none_or(|end| Instant::now() + wait < end) => sleep(wait).await,
                (_, Ok(response)) => {
                    self.shared.throttle.succeed_if(response.headers());
                    let end = deadline.map(|end| Box::pin(sleep_until(end)));
                    return Ok(response.map(|inner| Body::new(Bounded { inner, end })));
                }
                (_, Err(failed)) => return Err(unavailable(&failed.status)),
            }
        }
    }

    async fn attempt(&self, head: Parts, message: Bytes) -> Result<Response<Body>, Failed> {
        let mut channel = self.channel.clone();
        let sent = async {
            poll_fn(|cx| channel.poll_ready(cx)).await?;
            channel.call(Request::from_parts(head, Body::new(Full::new(message)))).await
        };
        sent.await.map_err(|error| {
            let text = chain(&error);
            let code = Status::from_error(Box::new(error)).code();
            // tonic says so of connections that could not be made alone, and of pings that were not answered.
            Failed { status: Status::new(code, text), is_unconnected: code == Code::Unavailable }
        })
    }
}

/// An attempt without any answer.
struct Failed {
    status: Status,
    is_unconnected: bool,
}

impl Shared {
    fn add_metadata(&self, headers: &mut HeaderMap) -> Result<(), Status> {
        if let Some(token) = &self.token {
            headers.insert("authorization", token_value(&token())?);
        }
        if let Some(id) = &self.client_id {
            headers.insert("x-client-id", id.clone());
        }
        Ok(())
    }
}

pub(crate) fn token_value(token: &str) -> Result<HeaderValue, Status> {
    let mut value = HeaderValue::try_from(format!("bearer {token}"))
        .map_err(|_| Status::unauthenticated("the token has characters that no header may hold"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A call that ended before any answer.
#[derive(Debug, Clone, Copy)]
struct Refusal {
    code: Code,
    /// Milliseconds; negative or not a number: do not come again.
    pushback: Option<i64>,
}

fn refusal_of<B>(response: &Response<B>) -> Option<Refusal> {
    let headers = response.headers();
    let code = match headers.get("grpc-status") {
        Some(value) => Code::from_bytes(value.as_bytes()),
        None => match response.status() {
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Code::Unavailable,
            _ => return None,
        },
    };
    let pushback = headers
        .get("grpc-retry-pushback-ms")
        .map(|value| value.to_str().ok().and_then(|text| text.parse().ok()).unwrap_or(-1));
    (code != Code::Ok).then_some(Refusal { code, pushback })
}

impl Refusal {
    /// How long to wait before the next attempt, after so many; None for no more.
    fn wait(self, num_attempts: u32, max_attempts: u32, throttle: &Throttle) -> Option<Duration> {
        if !matches!(self.code, Code::Unavailable | Code::ResourceExhausted) {
            return None;
        }
        let is_let = throttle.fail();
        if num_attempts >= max_attempts || !is_let {
            return None;
        }
        match self.pushback {
            Some(told) => u64::try_from(told).ok().map(Duration::from_millis),
            None => Some(backoff(num_attempts)),
        }
    }
}

fn backoff(num_attempts: u32) -> Duration {
    let doubled = FIRST_BACKOFF_SECONDS * 2f64.powi(num_attempts.saturating_sub(1).min(30) as i32);
    Duration::from_secs_f64(doubled.min(MAX_BACKOFF_SECONDS) * (1.0 + JITTER * (2.0 * fastrand::f64() - 1.0)))
}

/// Lets nothing be tried again while most calls fail, so that a dead server is not hammered. Counts fifths of tokens.
#[derive(Debug)]
pub(crate) struct Throttle(AtomicU32);

impl Throttle {
    const FULL: u32 = 20 * 5;

    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(Self::FULL))
    }

    /// Whether one may try again after this failure.
    fn fail(&self) -> bool {
        let take = |left: u32| Some(left.saturating_sub(5));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or_default();
        before.saturating_sub(5) > Self::FULL / 2
    }

    fn succeed(&self) {
        // It always has a value to set.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some((left + 1).min(Self::FULL)));
    }

    /// An answer has begun, or its status is OK.
    fn succeed_if(&self, headers: &HeaderMap) {
        if headers.get("grpc-status").is_none_or(|value| value == "0") {
            self.succeed();
        }
    }
}

async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T, Status> {
    match deadline {
        Some(end) => timeout_at(end, work).await.map_err(|_| too_late()),
        None => Ok(work.await),
    }
}

fn too_late() -> Status {
    Status::deadline_exceeded("the deadline passed")
}

/// What broke on the way is UNAVAILABLE, as other gRPC libraries call it.
fn unavailable(status: &Status) -> Status {
    Status::unavailable(if status.message().is_empty() { "the connection broke" } else { status.message() })
}

fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// An answer's body that ends at the deadline.
struct Bounded {
    inner: Body,
    end: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            let broken = |status: Status| Status::unavailable(chain(&status));
            return Poll::Ready(frame.map(|frame| frame.map_err(broken)));
        }
        if self.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Some(Err(too_late())));
        }
        Poll::Pending
    }
}

/// Of the value of grpc-timeout: up to eight digits and a unit.
fn parse_timeout(value: &HeaderValue) -> Result<Duration, Status> {
    let wrong = || Status::internal("grpc-timeout is no time");
    let text = value.to_str().map_err(|_| wrong())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    Ok(match unit {
        "H" => Duration::from_secs(number.saturating_mul(3600)),
        "M" => Duration::from_secs(number.saturating_mul(60)),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return Err(wrong()),
    })
}

fn timeout_value(left: Duration) -> Result<HeaderValue, Status> {
    let text = [(left.as_micros(), 'u'), (left.as_millis(), 'm'), (left.as_secs().into(), 'S')]
        .into_iter()
        .find(|(number, _)| *number < 100_000_000)
        .map_or_else(|| "99999999S".to_owned(), |(number, unit)| format!("{number}{unit}"));
    HeaderValue::try_from(text).map_err(|_| Status::internal("grpc-timeout is no header"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: &str, pushback: Option<&str>) -> Option<Refusal> {
        let mut response = Response::builder().header("grpc-status", code);
        if let Some(told) = pushback {
            response = response.header("grpc-retry-pushback-ms", told);
        }
        refusal_of(&response.body(()).expect("a response"))
    }

    fn waits(code: &str, pushback: Option<&str>, num_attempts: u32) -> Option<Duration> {
        refused(code, pushback).and_then(|refusal| refusal.wait(num_attempts, 4, &Throttle::new()))
    }

    #[test]
    fn tries_again_what_may_pass() {
        for code in ["14", "8"] {
            let mut wanted_seconds = 0.1;
            for num_attempts in 1..4 {
                let wait = waits(code, None, num_attempts).expect("one more").as_secs_f64();
                assert!((wanted_seconds * 0.8..=wanted_seconds * 1.2).contains(&wait), "{wait}");
                wanted_seconds *= 2.0;
            }
            assert_eq!(waits(code, None, 4), None);
        }
        for code in ["0", "1", "3", "4", "5", "13", "16"] {
            assert_eq!(waits(code, None, 1), None, "{code}");
        }
    }

    #[test]
    fn comes_when_told() {
        assert_eq!(waits("14", Some("1500"), 1), Some(Duration::from_millis(1500)));
        assert_eq!(waits("14", Some("-1"), 1), None);
        assert_eq!(waits("14", Some("soon"), 1), None);
    }

    #[test]
    fn an_answer_that_began_is_not_refused() {
        assert!(refusal_of(&Response::new(())).is_none());
        let proxy = Response::builder().status(503).body(()).expect("a response");
        assert_eq!(refusal_of(&proxy).map(|refusal| refusal.code), Some(Code::Unavailable));
    }

    #[test]
    fn a_dead_server_is_not_hammered() {
        let throttle = Throttle::new();
        let num_retried = (0..20).filter(|_| throttle.fail()).count();
        assert_eq!(num_retried, 9);
        for _ in 0..56 {
            throttle.succeed();
        }
        assert!(throttle.fail());
        assert!(!throttle.fail());
    }

    #[test]
    fn timeouts_fit_their_header() {
        for (duration, text) in [
            (Duration::from_millis(700), "700000u"),
            (Duration::from_secs(200), "200000m"),
            (Duration::from_secs(1_000_000), "1000000S"),
            (Duration::MAX, "99999999S"),
        ] {
            let value = timeout_value(duration).expect("a header");
            assert_eq!(value, text);
            assert_eq!(parse_timeout(&value).ok(), Some(duration.min(Duration::from_secs(99_999_999))));
        }
        for wrong in ["", "S", "5", "5x", "-5S"] {
            assert!(parse_timeout(&HeaderValue::from_static(wrong)).is_err(), "{wrong}");
        }
    }
}
