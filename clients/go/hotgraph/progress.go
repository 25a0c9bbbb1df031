package hotgraph

// One generation over as many connections as it takes: what came so far, and what to do when a connection ends. It knows
// messages and time but no channel: generation.go opens the calls and reads them.
//
// A stream that ended without Finished, and that the caller did not cancel, is a lost server, whatever the status: what
// stands between client and server changes the code. The exceptions are the daemon's own refusals, errors of the request and
// deadlines. Before the server's headers gRPC's own retries apply (serviceConfig), after them these rules: the same request goes
// out again with the seed that Started told and, for each choice that has not ended, the tokens that came. The server goes on
// from them and sends only what is new, so that ids and texts join without a seam. A call whose connection breaks between the
// headers and the first event gRPC does not try again; nothing came of it, so the request goes out as it was.

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

const maxRequestIDLength = 128

// Resume says when Generate goes on with an answer after a lost server.
type Resume int

const (
	// ResumeRepeatable goes on with greedy requests and those with a seed, and with any other before its first token.
	ResumeRepeatable Resume = iota
	// ResumeAlways goes on with the seed that the server drew.
	ResumeAlways
	// ResumeNever leaves it at what gRPC tries again by itself.
	ResumeNever
)

// ResumePolicy says how far to go after a lost server. Waits double from the first to the longest, each times 0.5 to 1.5 at
// random.
type ResumePolicy struct {
	// MaxLosses are servers lost in the middle of one generation, or between their headers and its first event; it bounds what
	// a request that kills servers can do.
	MaxLosses int
	// MaxAttempts are tries in a row to reach a server again, each of them with gRPC's own retries.
	MaxAttempts  int
	FirstBackoff time.Duration
	MaxBackoff   time.Duration
	// Idle makes a stream whose tokens pause for longer count as lost, for paths on which keepalive does not reach the server
	// itself (a proxy answers it). 0: never.
	Idle time.Duration
}

// DefaultResumePolicy is what a client has that is told none.
func DefaultResumePolicy() ResumePolicy {
	return ResumePolicy{MaxLosses: 3, MaxAttempts: 8, FirstBackoff: 100 * time.Millisecond, MaxBackoff: 5 * time.Second}
}

// LostError is a server that was lost in the middle of an answer, when going on elsewhere was off, not possible or in vain.
// errors.As finds its Cause too.
type LostError struct {
	// Cause is how the connection told it, which depends on what stands between client and server.
	Cause *Error
	// Started and Choices are what came until then.
	Started *hotgraphv1.Started
	Choices []*hotgraphv1.Choice
}

// Error is the cause's.
func (e *LostError) Error() string { return e.Cause.Error() }

// Unwrap is the cause.
func (e *LostError) Unwrap() error { return e.Cause }

// GRPCStatus lets status.Code work.
func (e *LostError) GRPCStatus() *status.Status { return e.Cause.status }

type state int

const (
	stateNew   state = iota
	stateOpen        // a connection is there, or under way
	stateLost        // waits before the next connection
	stateEnded       // finished, failed or cancelled
)

var transitions = map[state][]state{
	stateNew:  {stateOpen, stateEnded},
	stateOpen: {stateLost, stateEnded},
	stateLost: {stateOpen, stateEnded},
}

// record is what came of one choice.
type record struct {
	tokenIDs    []uint32
	text        strings.Builder
	logprobs    []*hotgraphv1.TokenLogprobs
	finish      *hotgraphv1.ChoiceFinish
	first, last time.Time // of its tokens
}

func (r *record) add(tokens *hotgraphv1.Tokens, now time.Time) {
	if len(tokens.GetTokenIds()) > 0 {
		if len(r.tokenIDs) == 0 {
			r.first = now
		}
		r.last = now
	}
	r.tokenIDs = append(r.tokenIDs, tokens.GetTokenIds()...)
	r.text.WriteString(tokens.GetText())
	r.logprobs = append(r.logprobs, tokens.GetLogprobs()...)
	if tokens.GetFinish() != nil {
		r.finish = tokens.GetFinish()
	}
}

// progress is not safe for use by several goroutines.
type progress struct {
	request  *hotgraphv1.GenerateRequest
	resume   Resume
	policy   ResumePolicy
	deadline time.Time // zero: none
	now      func() time.Time
	uniform  func(low, high float64) float64

	state                state
	began                time.Time
	started              *hotgraphv1.Started
	finished             *hotgraphv1.Finished
	err                  error // what it failed with
	numResumes           int
	records              map[uint32]*record
	numConnections       int
	numLosses            int
	numFailedAttempts    int // in a row, without an event
	isConnectionAnswered bool
	hasConnectionTokens  bool
	endedBefore          []uint32 // choices that were whole when this connection began
}

func newProgress(request *hotgraphv1.GenerateRequest, resume Resume, policy ResumePolicy, deadline time.Time) *progress {
	p := &progress{
		request:  request,
		resume:   resume,
		policy:   policy,
		deadline: deadline,
		now:      time.Now,
		uniform:  func(low, high float64) float64 { return low + (high-low)*rand.Float64() },
		records:  map[uint32]*record{},
	}
	p.began = p.now()
	numChoices := uint32(1)
	if request.NumChoices != nil {
		numChoices = request.GetNumChoices()
	}
	for index := range min(numChoices, 1024) { // more than a server takes; it says so
		p.records[index] = &record{}
	}
	return p
}

func (p *progress) isEnded() bool { return p.state == stateEnded }

// isIdleBounded tells whether the next event must come within policy.Idle: tokens flow on this connection.
func (p *progress) isIdleBounded() bool { return p.policy.Idle > 0 && p.hasConnectionTokens }

func (p *progress) indexes() []uint32 {
	found := make([]uint32, 0, len(p.records))
	for index := range p.records {
		found = append(found, index)
	}
	slices.Sort(found)
	return found
}

func (p *progress) record(index uint32) *record {
	r, ok := p.records[index]
	if !ok {
		r = &record{}
		p.records[index] = r
	}
	return r
}

func (p *progress) hasTokens() bool {
	for _, r := range p.records {
		if len(r.tokenIDs) > 0 {
			return true
		}
	}
	return false
}

// choices is every choice as far as it came.
func (p *progress) choices() []*hotgraphv1.Choice {
	var found []*hotgraphv1.Choice
	for _, index := range p.indexes() {
		r := p.records[index]
		found = append(found, &hotgraphv1.Choice{
			Index: index, Text: r.text.String(), TokenIds: slices.Clone(r.tokenIDs), Logprobs: slices.Clone(r.logprobs),
			Finish: r.finish,
		})
	}
	return found
}

// completion is the whole answer, once it has finished.
func (p *progress) completion() *hotgraphv1.CompleteResponse {
	return &hotgraphv1.CompleteResponse{
		RequestId: p.started.GetRequestId(),
		Model:     p.started.GetModel(),
		Seed:      p.started.GetSeed(),
		Choices:   p.choices(),
		Usage:     p.finished.GetUsage(),
		Timings:   p.finished.GetTimings(),
		Receipt:   p.finished.GetReceipt(),
	}
}

// open is what the next connection sends: from new or lost to open. It fails when the time is over.
func (p *progress) open() (*hotgraphv1.GenerateRequest, error) {
	var left time.Duration
	if !p.deadline.IsZero() {
		if left = p.deadline.Sub(p.now()); left <= 0 {
			return nil, p.fail(newError(codes.DeadlineExceeded, "the deadline passed"))
		}
	}
	p.move(stateOpen)
	p.isConnectionAnswered, p.hasConnectionTokens = false, false
	p.numConnections++
	p.endedBefore = p.endedBefore[:0]
	for _, index := range p.indexes() {
		if p.records[index].finish != nil {
			p.endedBefore = append(p.endedBefore, index)
		}
	}
	if p.numConnections == 1 {
		return p.request, nil
	}
	return p.again(left), nil
}

// again is the request for a connection after the first.
func (p *progress) again(left time.Duration) *hotgraphv1.GenerateRequest {
	request := proto.Clone(p.request).(*hotgraphv1.GenerateRequest)
	if left > 0 {
		request.Timeout = durationpb.New(left)
	}
	base := request.GetRequestId()
	if p.started != nil {
		base = p.started.GetRequestId()
	}
	if base != "" {
		// The id itself may still be in flight on a server that is only half dead.
		suffix := fmt.Sprintf("/resume-%d", p.numConnections-1)
		request.RequestId = base[:min(len(base), maxRequestIDLength-len(suffix))] + suffix
	}
	if p.started != nil {
		request.Model = p.started.GetModel()
		if request.Sampling == nil {
			request.Sampling = &hotgraphv1.SamplingParams{}
		}
		request.Sampling.Seed = proto.Uint64(p.started.GetSeed())
	}
	if p.hasTokens() {
		for _, index := range p.indexes() {
			if r := p.records[index]; r.finish == nil {
				resumed := &hotgraphv1.ResumedChoice{Index: index, TokenIds: slices.Clone(r.tokenIDs)}
				request.Resume = append(request.Resume, resumed)
			}
		}
	}
	return request
}

// receive takes in what the connection sent: the event for the caller, or nil when there is none in it. It fails when the
// server that goes on would not give the same tokens.
func (p *progress) receive(message *hotgraphv1.GenerateResponse) (*hotgraphv1.GenerateResponse, error) {
	switch event := message.GetEvent().(type) {
	case *hotgraphv1.GenerateResponse_Started:
		p.isConnectionAnswered, p.numFailedAttempts = true, 0
		return p.takeStarted(message, event.Started)
	case *hotgraphv1.GenerateResponse_Tokens:
		p.hasConnectionTokens = true
		p.record(event.Tokens.GetChoiceIndex()).add(event.Tokens, p.now())
	case *hotgraphv1.GenerateResponse_Finished:
		return p.finish(p.merge(event.Finished)), nil
	}
	return message, nil
}

func (p *progress) takeStarted(
	message *hotgraphv1.GenerateResponse, started *hotgraphv1.Started,
) (*hotgraphv1.GenerateResponse, error) {
	if p.started == nil {
		p.started = started
		return message, nil
	}
	if p.started.GetModel() != started.GetModel() || p.started.GetSeed() != started.GetSeed() ||
		p.started.GetPromptTokens() != started.GetPromptTokens() {
		return nil, p.fail(p.lost("the server that answered again has another model, prompt or seed", nil))
	}
	p.numResumes++
	return nil, nil
}

// lose takes in that the connection ended before Finished, with this error or, when it is nil, with OK: from open to lost, or
// to ended. It returns the wait before open, or the last event when nothing but it was missing. It fails when the generation
// cannot go on: with the daemon's own error as it is, with any other loss after the first event as a LostError. hadHeaders: the
// server had begun to answer.
func (p *progress) lose(cause *Error, hadHeaders bool) (time.Duration, *hotgraphv1.GenerateResponse, error) {
	isAnswered := p.started != nil
	if cause != nil && !isLoss(cause, isAnswered || p.numConnections > 1, hadHeaders) {
		return 0, nil, p.fail(cause)
	}
	if isAnswered && p.areAllFinished() {
		return 0, p.finish(p.finishedAlone()), nil
	}
	var loss error = cause
	isOwnWord := cause != nil && cause.ReasonName != "" && cause.Kind() == KindRetryable
	if cause == nil || (isAnswered && !isOwnWord) {
		loss = p.lost("the server was lost in the middle of an answer", cause)
	}
	if p.isConnectionAnswered || !isAnswered && hadHeaders {
		p.numLosses++
	} else {
		p.numFailedAttempts++
	}
	delay := p.delay(cause)
	isInTime := p.deadline.IsZero() || p.now().Add(delay).Before(p.deadline)
	if !p.mayResume() || !isInTime {
		return 0, nil, p.fail(loss)
	}
	p.move(stateLost)
	return delay, nil, nil
}

// isLoss tells whether a stream that ended with this error lost its server. isReached: a server was lost before, or told an
// event. hadHeaders: the server had begun to answer.
func isLoss(err *Error, isReached, hadHeaders bool) bool {
	switch {
	case err.Kind() == KindCancelled:
		return true // not by us: something between us and the server let go
	case err.ReasonName != "":
		return isReached && err.Kind() == KindRetryable
	case err.Code == codes.Unavailable:
		return isReached || hadHeaders // before the headers gRPC has tried again already
	case err.Code == codes.ResourceExhausted:
		return isReached
	default:
		return err.Kind() != KindRequest && err.Kind() != KindDeadline
	}
}

func (p *progress) areAllFinished() bool {
	for _, r := range p.records {
		if r.finish == nil {
			return false
		}
	}
	return true
}

func (p *progress) mayResume() bool {
	if p.numLosses > p.policy.MaxLosses || p.numFailedAttempts >= p.policy.MaxAttempts {
		return false
	}
	switch p.resume {
	case ResumeAlways:
		return true
	case ResumeNever:
		return false
	default:
		// Before any token there is nothing that a second try could contradict.
		return isRepeatable(p.request) || !p.hasTokens()
	}
}

// isRepeatable tells whether the same request gives the same tokens again by itself: greedy, or with a seed.
func isRepeatable(request *hotgraphv1.GenerateRequest) bool {
	sampling := request.GetSampling()
	return sampling != nil && (sampling.Seed != nil || sampling.Temperature != nil && sampling.GetTemperature() == 0)
}

func (p *progress) delay(cause *Error) time.Duration {
	backoff := p.policy.MaxBackoff
	if shift := p.numFailedAttempts; shift < 32 {
		backoff = min(p.policy.FirstBackoff<<shift, p.policy.MaxBackoff)
	}
	told := time.Duration(0)
	if cause != nil {
		told = cause.RetryAfter
	}
	// Never before the time told, and not all clients of one server at once.
	return time.Duration(max(float64(backoff)*p.uniform(0.5, 1.5), float64(told)*p.uniform(1, 1.25)))
}

func (p *progress) lost(message string, cause *Error) *LostError {
	code := codes.Unavailable
	if cause != nil {
		code, message = cause.Code, message+": "+cause.Message
	}
	e := newError(code, message)
	e.RequestID = p.started.GetRequestId()
	return &LostError{Cause: e, Started: p.started, Choices: p.choices()}
}

// merge is Finished as one unbroken call would have told it: choices and tokens of earlier connections count.
func (p *progress) merge(finished *hotgraphv1.Finished) *hotgraphv1.Finished {
	for _, finish := range finished.GetChoices() {
		p.record(finish.GetChoiceIndex()).finish = finish
	}
	whole := proto.Clone(finished).(*hotgraphv1.Finished)
	whole.Choices = p.finishes()
	if whole.Usage == nil {
		whole.Usage = &hotgraphv1.Usage{}
	}
	for _, index := range p.endedBefore {
		whole.Usage.CompletionTokens += uint32(len(p.records[index].tokenIDs))
	}
	return whole
}

func (p *progress) finishes() []*hotgraphv1.ChoiceFinish {
	var found []*hotgraphv1.ChoiceFinish
	for _, index := range p.indexes() {
		if finish := p.records[index].finish; finish != nil {
			found = append(found, finish)
		}
	}
	return found
}

// finishedAlone is Finished when every choice is whole and only that event was lost. Its timings are this side's.
func (p *progress) finishedAlone() *hotgraphv1.Finished {
	numTokens := 0
	longest := &record{}
	var first, last time.Time
	for _, r := range p.records {
		numTokens += len(r.tokenIDs)
		if len(r.tokenIDs) == 0 {
			continue
		}
		if len(r.tokenIDs) > len(longest.tokenIDs) {
			longest = r
		}
		if first.IsZero() || r.first.Before(first) {
			first = r.first
		}
		if r.last.After(last) {
			last = r.last
		}
	}
	timings := &hotgraphv1.Timings{Queue: durationpb.New(0), Total: durationpb.New(p.now().Sub(p.began))}
	if numTokens > 0 {
		timings.Prefill = durationpb.New(first.Sub(p.began))
		timings.TimeToFirstToken = durationpb.New(first.Sub(p.began))
		timings.Decode = durationpb.New(last.Sub(first))
	}
	if gaps := len(longest.tokenIDs) - 1; gaps > 0 {
		timings.TimePerOutputToken = durationpb.New(longest.last.Sub(longest.first) / time.Duration(gaps))
	}
	return &hotgraphv1.Finished{
		Choices: p.finishes(),
		Usage:   &hotgraphv1.Usage{PromptTokens: p.started.GetPromptTokens(), CompletionTokens: uint32(numTokens)},
		Timings: timings,
		Receipt: &hotgraphv1.Receipt{},
	}
}

func (p *progress) finish(finished *hotgraphv1.Finished) *hotgraphv1.GenerateResponse {
	p.finished = finished
	p.move(stateEnded)
	return &hotgraphv1.GenerateResponse{Event: &hotgraphv1.GenerateResponse_Finished{Finished: finished}}
}

func (p *progress) fail(err error) error {
	p.err = err
	p.move(stateEnded)
	return err
}

func (p *progress) move(next state) {
	if !slices.Contains(transitions[p.state], next) {
		panic(errors.New("hotgraph: a generation cannot go on from its end")) // a mistake of this package
	}
	p.state = next
}
