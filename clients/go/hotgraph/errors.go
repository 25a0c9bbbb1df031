package hotgraph

// The error of a failed call: its gRPC status and the google.rpc details in it. The only place that reads details.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

const domain = "hotgraph"

// Kind is what a caller can do about an error.
type Kind int

const (
	// KindInternal is a mistake of the server's or the connection's; Error.Incident finds it in the server's log.
	KindInternal Kind = iota
	// KindRequest wants the request mended; sending it again changes nothing.
	KindRequest
	// KindRetryable may pass: later, or elsewhere, not before Error.RetryAfter.
	KindRetryable
	// KindDeadline is out of time.
	KindDeadline
	// KindCancelled was cancelled.
	KindCancelled
	// KindExhausted was refused by the transport or a proxy, such as a message over a size limit.
	KindExhausted
)

// String is the kind's name in lower case.
func (k Kind) String() string {
	return [...]string{"internal", "request", "retryable", "deadline", "cancelled", "exhausted"}[k]
}

// Violation is one wrong field of a request: its path as in the contract, and what is wrong with it.
type Violation struct{ Field, Description string }

// Resource is what an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name.
type Resource struct{ Type, Name string }

// Error is why a call failed. Get it with errors.As; errors.Is knows context.Canceled and context.DeadlineExceeded.
type Error struct {
	// Code is the gRPC status code.
	Code codes.Code
	// Message is for people.
	Message string
	// Reason is why, for programs. Unspecified when the status is not the daemon's own word but a proxy's or gRPC's, and for
	// a reason that this version does not know, which ReasonName tells.
	Reason hotgraphv1.ErrorReason
	// ReasonName is the reason as it was sent.
	ReasonName string
	// Metadata are the numbers behind the message, as text.
	Metadata map[string]string
	// Violations are all wrong fields.
	Violations []Violation
	// RetryAfter is when to come back, if HasRetryAfter.
	RetryAfter    time.Duration
	HasRetryAfter bool
	// Resource is what was not found, or nil.
	Resource *Resource
	// RequestID is the request's, as the server knows it.
	RequestID string

	status *status.Status
}

// Error is the message with the code, and the reason where there is one.
func (e *Error) Error() string {
	if e.ReasonName != "" {
		return fmt.Sprintf("hotgraph: %s (%s): %s", e.Code, e.ReasonName, e.Message)
	}
	return fmt.Sprintf("hotgraph: %s: %s", e.Code, e.Message)
}

// GRPCStatus lets status.FromError and status.Code work.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// Is lets errors.Is find the errors of contexts.
func (e *Error) Is(target error) bool {
	return e.Code == codes.Canceled && target == context.Canceled ||
		e.Code == codes.DeadlineExceeded && target == context.DeadlineExceeded
}

// Incident finds an internal error in the server's log; else it is empty.
func (e *Error) Incident() string { return e.Metadata["incident"] }

// Kind is what can be done about it: by the reason, and by the code when there is none.
func (e *Error) Kind() Kind {
	if kind, ok := kindByReason[e.Reason]; ok {
		return kind
	}
	return kindByCode[e.Code]
}

// IsRetryable tells whether the same request may succeed later or elsewhere.
func IsRetryable(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind() == KindRetryable
}

var kindByReason = map[hotgraphv1.ErrorReason]Kind{
	hotgraphv1.ErrorReason_ERROR_REASON_INVALID_REQUEST:   KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_MALFORMED_MESSAGE: KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_CONTEXT_LENGTH:    KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_MODEL_NOT_FOUND:   KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_GRAPH_NOT_FOUND:   KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_SERVICE_NOT_FOUND: KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_DUPLICATE_REQUEST: KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_NOT_POSSIBLE:      KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_EVENTS_GONE:       KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED:   KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_PERMISSION_DENIED: KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_MESSAGE_TOO_LARGE: KindRequest,
	hotgraphv1.ErrorReason_ERROR_REASON_QUEUE_FULL:        KindRetryable,
	hotgraphv1.ErrorReason_ERROR_REASON_GRAPH_NOT_READY:   KindRetryable,
	hotgraphv1.ErrorReason_ERROR_REASON_LOADING:           KindRetryable,
	hotgraphv1.ErrorReason_ERROR_REASON_DRAINING:          KindRetryable,
	hotgraphv1.ErrorReason_ERROR_REASON_ENGINE_FAILED:     KindRetryable,
	hotgraphv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED: KindDeadline,
	hotgraphv1.ErrorReason_ERROR_REASON_SERVER_TIME_LIMIT: KindDeadline,
	hotgraphv1.ErrorReason_ERROR_REASON_CANCELLED:         KindCancelled,
	hotgraphv1.ErrorReason_ERROR_REASON_INTERNAL:          KindInternal,
}

// Codes that are not here are KindInternal.
var kindByCode = map[codes.Code]Kind{
	codes.InvalidArgument:    KindRequest,
	codes.NotFound:           KindRequest,
	codes.AlreadyExists:      KindRequest,
	codes.FailedPrecondition: KindRequest,
	codes.Unimplemented:      KindRequest,
	codes.OutOfRange:         KindRequest,
	codes.Unauthenticated:    KindRequest,
	codes.PermissionDenied:   KindRequest,
	codes.ResourceExhausted:  KindExhausted,
	codes.Unavailable:        KindRetryable,
	codes.Aborted:            KindRetryable,
	codes.DeadlineExceeded:   KindDeadline,
	codes.Canceled:           KindCancelled,
}

// FromError is the error that gRPC's stands for: what the stubs of a connection that this package did not make return. Nil
// and io.EOF are no errors of a call and come back as they are.
func FromError(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	var typed *Error
	if errors.As(err, &typed) {
		return err
	}
	return fromStatus(status.Convert(err))
}

// newError is an error that this side found.
func newError(code codes.Code, message string) *Error { return fromStatus(status.New(code, message)) }

// fromStatus reads the details. One that cannot be read counts as absent.
func fromStatus(s *status.Status) *Error {
	e := &Error{Code: s.Code(), Message: s.Message(), status: s}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == domain {
				e.ReasonName, e.Metadata = d.GetReason(), d.GetMetadata()
				e.Reason = hotgraphv1.ErrorReason(hotgraphv1.ErrorReason_value["ERROR_REASON_"+d.GetReason()])
			}
		case *errdetails.BadRequest:
			for _, violation := range d.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{violation.GetField(), violation.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter, e.HasRetryAfter = max(d.GetRetryDelay().AsDuration(), 0), true
		case *errdetails.ResourceInfo:
			e.Resource = &Resource{d.GetResourceType(), d.GetResourceName()}
		case *errdetails.RequestInfo:
			e.RequestID = d.GetRequestId()
		}
	}
	return e
}

// typedUnary and typedStream let every stub of a Client return this package's errors.
func typedUnary(
	ctx context.Context, method string, request, response any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	return FromError(invoke(withSessionKey(ctx, request), method, request, response, cc, options...))
}

func typedStream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, options...)
	if err != nil {
		return nil, FromError(err)
	}
	return typedErrors{stream}, nil
}

type typedErrors struct{ grpc.ClientStream }

func (s typedErrors) SendMsg(message any) error { return FromError(s.ClientStream.SendMsg(message)) }
func (s typedErrors) RecvMsg(message any) error { return FromError(s.ClientStream.RecvMsg(message)) }
