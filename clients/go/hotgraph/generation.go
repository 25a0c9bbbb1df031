package hotgraph

import (
	"context"
	"errors"
	"io"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

const (
	settleTime = time.Second     // how long the status after the last event may take
	graceTime  = 2 * time.Second // beyond the request's timeout, for the server to tell that it passed
)

var errClosed = errors.New("the client was closed")

// Generation is one generation under way: Started, Tokens and Finished, as they come. After a lost server it goes on over a
// new connection without the reader noticing, as the client's Resume and ResumePolicy allow. One goroutine reads; Close may
// be called by any.
type Generation struct {
	stub   hotgraphv1.InferenceServiceClient
	ctx    context.Context
	cancel context.CancelCauseFunc
	free   func() // what the context holds

	mu       sync.Mutex // over progress
	progress *progress

	// Of the reader alone.
	stream    grpc.ServerStreamingClient[hotgraphv1.GenerateResponse]
	streamErr error // that opening it failed with
	endStream context.CancelFunc
	wait      time.Duration
	isSettled bool
}

func newGeneration(
	ctx context.Context, c *Client, request *hotgraphv1.GenerateRequest, resume Resume, policy ResumePolicy,
) *Generation {
	ctx, cancel := context.WithCancelCause(withSessionKey(ctx, request))
	stopClose := context.AfterFunc(c.ctx, func() { cancel(errClosed) })
	deadline, _ := ctx.Deadline()
	stopTimer := context.CancelFunc(func() {})
	if timeout := request.GetTimeout(); timeout != nil && timeout.AsDuration() > 0 {
		if end := time.Now().Add(timeout.AsDuration()); deadline.IsZero() || end.Before(deadline) {
			deadline = end
			ctx, stopTimer = context.WithDeadline(ctx, end.Add(graceTime))
		}
	}
	g := &Generation{stub: c.Inference, ctx: ctx, cancel: cancel, progress: newProgress(request, resume, policy, deadline)}
	g.free = func() { stopClose(); stopTimer() }
	g.open()
	return g
}

// open begins the next connection. What goes wrong is told by the first read.
func (g *Generation) open() {
	g.mu.Lock()
	request, err := g.progress.open()
	g.mu.Unlock()
	if err != nil {
		return // the progress has ended, and tells it
	}
	if g.endStream != nil {
		g.endStream()
	}
	var ctx context.Context
	ctx, g.endStream = context.WithCancel(g.ctx)
	g.stream, g.streamErr = g.stub.Generate(ctx, request)
}

// Recv is the next event; io.EOF after Finished. A LostError or another *Error ends it.
func (g *Generation) Recv() (*hotgraphv1.GenerateResponse, error) {
	for {
		g.mu.Lock()
		state, err := g.progress.state, g.progress.err
		g.mu.Unlock()
		if state == stateEnded {
			if err != nil {
				g.Close()
				return nil, err
			}
			g.settle()
			return nil, io.EOF
		}
		event, err := g.advance(state)
		if err != nil {
			g.Close()
			return nil, err
		}
		if event != nil {
			return event, nil
		}
	}
}

// advance reads one message, or waits and opens the next connection.
func (g *Generation) advance(state state) (*hotgraphv1.GenerateResponse, error) {
	if state == stateLost {
		timer := time.NewTimer(g.wait)
		defer timer.Stop()
		select {
		case <-g.ctx.Done():
			return nil, g.ended()
		case <-timer.C:
			g.open()
			return nil, nil
		}
	}
	message, cause := g.read()
	if cause != nil && g.ctx.Err() != nil && cause.ReasonName == "" {
		return nil, g.ended()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if message != nil {
		return g.progress.receive(message)
	}
	wait, event, err := g.progress.lose(cause, g.hadHeaders())
	g.wait = wait
	return event, err
}

// ended tells why the context is over.
func (g *Generation) ended() error {
	code, message := codes.Canceled, context.Cause(g.ctx).Error()
	if errors.Is(g.ctx.Err(), context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.progress.isEnded() {
		return g.progress.err
	}
	return g.progress.fail(newError(code, message))
}

// read is the next message; neither message nor error when the stream ended with OK.
func (g *Generation) read() (*hotgraphv1.GenerateResponse, *Error) {
	err := g.streamErr
	var message *hotgraphv1.GenerateResponse
	var isIdle atomic.Bool
	if err == nil {
		g.mu.Lock()
		isBounded, idle := g.progress.isIdleBounded(), g.progress.policy.Idle
		g.mu.Unlock()
		if isBounded {
			end := g.endStream
			timer := time.AfterFunc(idle, func() { isIdle.Store(true); end() })
			defer timer.Stop()
		}
		message, err = g.stream.Recv()
	}
	switch {
	case err == nil:
		return message, nil
	case err == io.EOF:
		return nil, nil
	case isIdle.Load():
		return nil, newError(codes.Unavailable, "no event for "+g.progress.policy.Idle.String())
	}
	var typed *Error
	if !errors.As(FromError(err), &typed) {
		typed = newError(codes.Unknown, err.Error())
	}
	return nil, typed
}

// hadHeaders tells whether the server began to answer on the connection that has just ended.
func (g *Generation) hadHeaders() bool {
	if g.stream == nil || g.streamErr != nil {
		return false
	}
	headers, err := g.stream.Header() // does not wait any more
	return err == nil && headers != nil
}

// settle lets a finished call end by itself: a cancel now would look to the server as if the caller had left.
func (g *Generation) settle() {
	if g.isSettled {
		return
	}
	g.isSettled = true
	if g.stream != nil {
		timer := time.AfterFunc(settleTime, g.endStream)
		for {
			if _, err := g.stream.Recv(); err != nil {
				break // its status; everything is here already
			}
		}
		timer.Stop()
	}
	g.Close()
}

// Close ends it if it has not ended; the server frees its place at the next step, and a waiting reader gets an error of
// KindCancelled. After io.EOF or an error it does nothing.
func (g *Generation) Close() {
	g.cancel(context.Canceled)
	g.free()
}

// Events are the events, each of Started, Tokens and Finished. Leaving the loop before the end ends the call. An error is the
// last of them.
func (g *Generation) Events() iter.Seq2[*hotgraphv1.GenerateResponse, error] {
	return func(yield func(*hotgraphv1.GenerateResponse, error) bool) {
		defer g.leave()
		for {
			event, err := g.Recv()
			if err == io.EOF || !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// Texts are the pieces of the first choice's text, as they come. Leaving the loop before the end ends the call.
func (g *Generation) Texts() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for event, err := range g.Events() {
			if err != nil {
				yield("", err)
				return
			}
			tokens := event.GetTokens()
			if tokens.GetText() != "" && tokens.GetChoiceIndex() == 0 && !yield(tokens.GetText(), nil) {
				return
			}
		}
	}
}

// leave ends it without making a finished call look cancelled.
func (g *Generation) leave() {
	g.mu.Lock()
	isFinished := g.progress.finished != nil
	g.mu.Unlock()
	if isFinished {
		g.settle()
	}
	g.Close()
}

// Result reads what is left: the whole answer, events already read included.
func (g *Generation) Result() (*hotgraphv1.CompleteResponse, error) {
	for _, err := range g.Events() {
		if err != nil {
			return nil, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.progress.completion(), nil
}

// Started is the first event, or nil before it came.
func (g *Generation) Started() *hotgraphv1.Started {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.progress.started
}

// Finished is the last event, or nil before it came.
func (g *Generation) Finished() *hotgraphv1.Finished {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.progress.finished
}

// Text is that of the first choice so far.
func (g *Generation) Text() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if first, ok := g.progress.records[0]; ok {
		return first.text.String()
	}
	return ""
}

// Choices is every choice as far as it came.
func (g *Generation) Choices() []*hotgraphv1.Choice {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.progress.choices()
}

// NumResumes is how often another connection went on so far.
func (g *Generation) NumResumes() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.progress.numResumes
}
