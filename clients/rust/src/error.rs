//! The error of a failed call: its gRPC status and the google.rpc details in it. The only place that reads details.

use std::{collections::HashMap, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetail, StatusExt};

use crate::v1;

const DOMAIN: &str = "hotgraph";

/// Why a call failed, by what a caller can do about it. `Error::from(status)` reads the status of a stub.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Error {
    /// What the client was told cannot work or is not safe. Nothing was sent.
    Setup(String),
    /// Wants the request mended; sending it again changes nothing.
    Request(Box<Failure>),
    /// May pass: later, or elsewhere, not before [`Failure::retry_after`].
    Retryable(Box<Failure>),
    /// Out of time.
    Deadline(Box<Failure>),
    /// Was cancelled.
    Cancelled(Box<Failure>),
    /// Refused by the transport or a proxy, such as a message over a size limit.
    Exhausted(Box<Failure>),
    /// A mistake of the server's or the connection's; [`Failure::incident`] finds it in the server's log.
    Internal(Box<Failure>),
    /// A server was lost in the middle of an answer, when going on elsewhere was off, not possible or in vain.
    Lost(Box<Lost>),
}

/// What is known of a failed call.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The gRPC status code.
    pub code: Code,
    /// For people.
    pub message: String,
    /// Why, for programs. None when the status is not the daemon's own word but a proxy's or gRPC's, and for a reason that
    /// this version does not know, which `reason_name` tells.
    pub reason: Option<v1::ErrorReason>,
    /// The reason as it was sent; may be empty.
    pub reason_name: String,
    /// The numbers behind the message, as text.
    pub metadata: HashMap<String, String>,
    /// All wrong fields.
    pub violations: Vec<Violation>,
    /// When to come back, if the server told.
    pub retry_after: Option<Duration>,
    /// What was not found.
    pub resource: Option<Resource>,
    /// The request's id, as the server knows it; may be empty.
    pub request_id: String,
}

/// A server that was lost in the middle of an answer, and what came until then.
#[derive(Debug, Clone)]
pub struct Lost {
    /// How the connection told it, which depends on what stands between client and server.
    pub cause: Failure,
    /// The first event, when it came.
    pub started: Option<v1::Started>,
    /// Every choice as far as it came.
    pub choices: Vec<v1::Choice>,
}

/// One wrong field of a request: its path as in the contract, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Violation {
    pub field: String,
    pub description: String,
}

/// What an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Resource {
    pub kind: String,
    pub name: String,
}

impl Error {
    /// What is known of the failed call; None for [`Error::Setup`].
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Setup(_) => None,
            Self::Lost(lost) => Some(&lost.cause),
            Self::Request(failure)
            | Self::Retryable(failure)
            | Self::Deadline(failure)
            | Self::Cancelled(failure)
            | Self::Exhausted(failure)
            | Self::Internal(failure) => Some(failure),
        }
    }

    /// Whether the same request may succeed later or elsewhere.
    pub fn is_retryable(&self) -> bool {
        self.failure().is_some_and(|failure| failure.kind() == Kind::Retryable)
    }

    /// Why, for programs, when the daemon told it.
    pub fn reason(&self) -> Option<v1::ErrorReason> {
        self.failure().and_then(|failure| failure.reason)
    }

    /// The gRPC status code; None for [`Error::Setup`].
    pub fn code(&self) -> Option<Code> {
        self.failure().map(|failure| failure.code)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.failure()) {
            (Self::Setup(message), _) => f.write_str(message),
            (_, Some(e)) if !e.reason_name.is_empty() => write!(f, "{:?} ({}): {}", e.code, e.reason_name, e.message),
            (_, Some(e)) => write!(f, "{:?}: {}", e.code, e.message),
            (_, None) => f.write_str("failed"),
        }
    }
}

impl std::error::Error for Error {}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Failure::from(status).into()
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let kind = failure.kind();
        let failure = Box::new(failure);
        match kind {
            Kind::Request => Self::Request(failure),
            Kind::Retryable => Self::Retryable(failure),
            Kind::Deadline => Self::Deadline(failure),
            Kind::Cancelled => Self::Cancelled(failure),
            Kind::Exhausted => Self::Exhausted(failure),
            Kind::Internal => Self::Internal(failure),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Internal,
    Request,
    Retryable,
    Deadline,
    Cancelled,
    Exhausted,
}

impl Failure {
    /// One that this side found.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            reason: None,
            reason_name: String::new(),
            metadata: HashMap::new(),
            violations: Vec::new(),
            retry_after: None,
            resource: None,
            request_id: String::new(),
        }
    }

    /// Finds an internal error in the server's log.
    pub fn incident(&self) -> Option<&str> {
        self.metadata.get("incident").map(String::as_str)
    }

    /// What can be done about it: by the reason, and by the code when there is none.
    pub(crate) fn kind(&self) -> Kind {
        self.reason.and_then(kind_of_reason).unwrap_or(match self.code {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::Unimplemented
            | Code::OutOfRange
            | Code::Unauthenticated
            | Code::PermissionDenied => Kind::Request,
            Code::ResourceExhausted => Kind::Exhausted,
            Code::Unavailable | Code::Aborted => Kind::Retryable,
            Code::DeadlineExceeded => Kind::Deadline,
            Code::Cancelled => Kind::Cancelled,
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => Kind::Internal,
        })
    }
}

fn kind_of_reason(reason: v1::ErrorReason) -> Option<Kind> {
    use v1::ErrorReason as R;
    Some(match reason {
        R::Unspecified => return None,
        R::InvalidRequest
        | R::MalformedMessage
        | R::ContextLength
        | R::ModelNotFound
        | R::GraphNotFound
        | R::ServiceNotFound
        | R::DuplicateRequest
        | R::NotPossible
        | R::EventsGone
        | R::Unauthenticated
        | R::PermissionDenied
        | R::MessageTooLarge => Kind::Request,
        R::QueueFull | R::GraphNotReady | R::Loading | R::Draining | R::EngineFailed => Kind::Retryable,
        R::DeadlineExceeded | R::ServerTimeLimit => Kind::Deadline,
        R::Cancelled => Kind::Cancelled,
        R::Internal => Kind::Internal,
    })
}

impl From<Status> for Failure {
    /// Details that cannot be read count as absent: the code alone must then do.
    fn from(status: Status) -> Self {
        let mut failure = Self::new(status.code(), status.message());
        for detail in status.check_error_details_vec().unwrap_or_default() {
            match detail {
                ErrorDetail::ErrorInfo(info) if info.domain == DOMAIN => {
                    failure.reason = v1::ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason));
                    failure.reason_name = info.reason;
                    failure.metadata = info.metadata;
                }
                ErrorDetail::BadRequest(bad) => {
                    failure.violations.extend(
                        bad.field_violations
                            .into_iter()
                            .map(|v| Violation { field: v.field, description: v.description }),
                    );
                }
                ErrorDetail::RetryInfo(info) => failure.retry_after = info.retry_delay,
                ErrorDetail::ResourceInfo(info) => {
                    failure.resource = Some(Resource { kind: info.resource_type, name: info.resource_name });
                }
                ErrorDetail::RequestInfo(info) => failure.request_id = info.request_id,
                _ => {}
            }
        }
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_kind() {
        let known: Vec<_> = (1..).map_while(|number| v1::ErrorReason::try_from(number).ok()).collect();
        assert!(known.len() >= 21);
        for reason in known {
            assert!(kind_of_reason(reason).is_some(), "{reason:?}");
        }
    }

    #[test]
    fn details_that_cannot_be_read_leave_the_code() {
        let failure = Failure::from(Status::with_details(Code::NotFound, "no", b"\xff\xff".as_slice().into()));
        assert_eq!((failure.code, failure.kind(), failure.reason), (Code::NotFound, Kind::Request, None));
    }

    #[test]
    fn a_reason_of_a_newer_server_goes_by_its_code() {
        let info = tonic_types::ErrorDetails::with_error_info("TIRED", DOMAIN, HashMap::new());
        let error = Error::from(Status::with_error_details(Code::Unavailable, "no", info));
        assert!(error.is_retryable() && error.reason().is_none());
        assert_eq!(error.failure().map(|f| f.reason_name.as_str()), Some("TIRED"));
    }
}
