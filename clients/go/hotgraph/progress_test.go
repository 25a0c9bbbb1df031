package hotgraph

// The rules of going on after a lost server, without any connection and with a clock that stands still.

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

func started(seed uint64) *hotgraphv1.GenerateResponse {
	return &hotgraphv1.GenerateResponse{Event: &hotgraphv1.GenerateResponse_Started{Started: &hotgraphv1.Started{
		RequestId: "r", Model: "m", PromptTokens: 5, Seed: seed,
	}}}
}

func tokens(index uint32, finish *hotgraphv1.ChoiceFinish, ids ...uint32) *hotgraphv1.GenerateResponse {
	return &hotgraphv1.GenerateResponse{Event: &hotgraphv1.GenerateResponse_Tokens{Tokens: &hotgraphv1.Tokens{
		ChoiceIndex: index, TokenIds: ids, Text: strings.Repeat("x", len(ids)), Finish: finish,
	}}}
}

func finished(numTokens uint32, finishes ...*hotgraphv1.ChoiceFinish) *hotgraphv1.GenerateResponse {
	return &hotgraphv1.GenerateResponse{Event: &hotgraphv1.GenerateResponse_Finished{Finished: &hotgraphv1.Finished{
		Choices: finishes, Usage: &hotgraphv1.Usage{PromptTokens: 5, CompletionTokens: numTokens},
	}}}
}

func stopped(index uint32) *hotgraphv1.ChoiceFinish {
	return &hotgraphv1.ChoiceFinish{ChoiceIndex: index, Reason: hotgraphv1.FinishReason_FINISH_REASON_STOP}
}

func bare(code codes.Code) *Error { return newError(code, "gone") }

// told is the daemon's own word.
func told(t *testing.T, code codes.Code, reason string, retryAfter time.Duration) *Error {
	t.Helper()
	s, err := status.New(code, "no").WithDetails(
		&errdetails.ErrorInfo{Domain: domain, Reason: reason}, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)},
	)
	if err != nil {
		t.Fatal(err)
	}
	return fromStatus(s)
}

func seeded() *hotgraphv1.GenerateRequest {
	return &hotgraphv1.GenerateRequest{Sampling: &hotgraphv1.SamplingParams{Seed: proto.Uint64(7)}}
}

// begun is a progress whose first connection sent these messages.
func begun(t *testing.T, request *hotgraphv1.GenerateRequest, resume Resume, messages ...*hotgraphv1.GenerateResponse) *progress {
	t.Helper()
	p := newProgress(request, resume, DefaultResumePolicy(), time.Time{})
	p.uniform = func(low, _ float64) float64 { return low }
	sent, err := p.open()
	if err != nil || sent != request {
		t.Fatalf("%v %v", sent, err)
	}
	for _, message := range messages {
		if event, err := p.receive(message); err != nil || event == nil {
			t.Fatalf("%v %v", event, err)
		}
	}
	return p
}

func TestGoesOnWithWhatItHas(t *testing.T) {
	request := seeded()
	request.NumChoices = proto.Uint32(3)
	p := begun(t, request, ResumeRepeatable, started(7), tokens(0, nil, 1, 2), tokens(1, stopped(1), 3))
	if wait, event, err := p.lose(bare(codes.Unavailable), true); wait <= 0 || event != nil || err != nil {
		t.Fatalf("%v %v %v", wait, event, err)
	}
	again, err := p.open()
	if err != nil {
		t.Fatal(err)
	}
	if again.GetRequestId() != "r/resume-1" || again.GetModel() != "m" || again.GetSampling().GetSeed() != 7 {
		t.Errorf("%v", again)
	}
	var resumed []uint32
	for _, choice := range again.GetResume() {
		resumed = append(resumed, choice.GetIndex())
	}
	if !slices.Equal(resumed, []uint32{0, 2}) || !slices.Equal(again.GetResume()[0].GetTokenIds(), []uint32{1, 2}) {
		t.Errorf("resumes %v", again.GetResume())
	}
	if event, err := p.receive(started(7)); event != nil || err != nil || p.numResumes != 1 {
		t.Errorf("a second started shows: %v %v", event, err)
	}
	event, err := p.receive(finished(5, stopped(0), stopped(2)))
	if err != nil || event.GetFinished().GetUsage().GetCompletionTokens() != 6 || len(event.GetFinished().GetChoices()) != 3 {
		t.Errorf("not as one unbroken call would tell: %v %v", event, err)
	}
	if len(request.GetResume()) != 0 {
		t.Error("the caller's request was changed")
	}
}

func TestWhatIsALoss(t *testing.T) {
	cases := []struct {
		name    string
		err     *Error
		reached bool
		headers bool
		is      bool
	}{
		{"refused before an answer", bare(codes.Unavailable), false, false, false},
		{"lost after the headers", bare(codes.Unavailable), false, true, true},
		{"a limit after the headers", bare(codes.ResourceExhausted), false, true, false},
		{"lost after it", bare(codes.Unavailable), true, false, true},
		{"a proxy's mistake", bare(codes.Internal), false, false, true},
		{"cancelled by another", bare(codes.Canceled), false, false, true},
		{"a deadline", bare(codes.DeadlineExceeded), true, true, false},
		{"a wrong request", bare(codes.InvalidArgument), true, true, false},
		{"draining after an answer", told(t, codes.Unavailable, "DRAINING", 0), true, false, true},
		{"draining before", told(t, codes.Unavailable, "DRAINING", 0), false, true, false},
		{"the daemon's own mistake", told(t, codes.Internal, "INTERNAL", 0), true, true, false},
	}
	for _, c := range cases {
		if got := isLoss(c.err, c.reached, c.headers); got != c.is {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestWhenItDoesNotGoOn(t *testing.T) {
	drawn := &hotgraphv1.GenerateRequest{}
	for _, c := range []struct {
		name    string
		request *hotgraphv1.GenerateRequest
		resume  Resume
		goesOn  bool
	}{
		{"a drawn seed", drawn, ResumeRepeatable, false},
		{"a drawn seed, always", drawn, ResumeAlways, true},
		{"a seed", seeded(), ResumeRepeatable, true},
		{"a seed, never", seeded(), ResumeNever, false},
	} {
		p := begun(t, c.request, c.resume, started(7), tokens(0, nil, 1))
		_, _, err := p.lose(nil, true)
		if (err == nil) != c.goesOn {
			t.Errorf("%s: %v", c.name, err)
		}
		var lost *LostError
		if err != nil && (!errors.As(err, &lost) || lost.Choices[0].GetTokenIds()[0] != 1 || status.Code(err) != codes.Unavailable) {
			t.Errorf("%s: %v does not tell what came", c.name, err)
		}
	}
	p := begun(t, drawn, ResumeRepeatable, started(7))
	if _, _, err := p.lose(nil, true); err != nil {
		t.Errorf("before any token there is nothing to contradict: %v", err)
	}
}

func TestLossesAndAttemptsAreBounded(t *testing.T) {
	p := begun(t, seeded(), ResumeAlways, started(7), tokens(0, nil, 1))
	var err error
	numOpen := 1
	for ; err == nil; numOpen++ {
		if _, _, err = p.lose(bare(codes.Unavailable), true); err == nil {
			if _, err = p.open(); err == nil {
				_, err = p.receive(started(7))
			}
		}
	}
	if numOpen-1 != p.policy.MaxLosses+1 {
		t.Errorf("%d losses", numOpen-1)
	}
	p = begun(t, seeded(), ResumeAlways, started(7), tokens(0, nil, 1))
	numLost := 0
	var last time.Duration
	for err = nil; err == nil; numLost++ {
		var wait time.Duration
		if wait, _, err = p.lose(bare(codes.Unavailable), false); err == nil {
			if wait < last || wait > p.policy.MaxBackoff {
				t.Errorf("waits %v after %v", wait, last)
			}
			last = wait
			_, err = p.open()
		}
	}
	if numLost != p.policy.MaxAttempts+1 {
		t.Errorf("%d tries", numLost)
	}
}

func TestGoesOnAsItWasAfterHeadersAlone(t *testing.T) {
	request := &hotgraphv1.GenerateRequest{RequestId: "mine"}
	p := begun(t, request, ResumeRepeatable)
	for number := 1; number <= p.policy.MaxLosses; number++ {
		if wait, _, err := p.lose(bare(codes.Unavailable), true); wait <= 0 || err != nil {
			t.Fatalf("%v %v", wait, err)
		}
		again, err := p.open()
		if err != nil || again.GetRequestId() != fmt.Sprintf("mine/resume-%d", number) {
			t.Fatalf("%v %v", again, err)
		}
		again.RequestId = request.RequestId
		if !proto.Equal(again, request) {
			t.Errorf("not as it was: %v", again)
		}
	}
	var lost *LostError
	if _, _, err := p.lose(bare(codes.Unavailable), true); status.Code(err) != codes.Unavailable || errors.As(err, &lost) {
		t.Errorf("not what gRPC said: %v", err)
	}
	p = begun(t, request, ResumeNever)
	if _, _, err := p.lose(bare(codes.Unavailable), true); err == nil {
		t.Error("goes on though it was told not to")
	}
	p = begun(t, request, ResumeRepeatable)
	if _, _, err := p.lose(bare(codes.Unavailable), true); err != nil {
		t.Fatal(err)
	}
	if _, err := p.open(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.lose(bare(codes.Unavailable), false); err != nil {
		t.Errorf("a server that was lost before is waited for: %v", err)
	}
}

func TestWaitsAsLongAsToldAndNoLongerThanTheDeadline(t *testing.T) {
	p := begun(t, seeded(), ResumeAlways, started(7), tokens(0, nil, 1))
	if wait, _, err := p.lose(told(t, codes.Unavailable, "DRAINING", 9*time.Second), true); wait < 9*time.Second || err != nil {
		t.Errorf("%v %v", wait, err)
	}
	p = begun(t, seeded(), ResumeAlways, started(7), tokens(0, nil, 1))
	p.deadline = p.now().Add(5 * time.Second)
	if _, _, err := p.lose(told(t, codes.Unavailable, "DRAINING", 9*time.Second), true); err == nil {
		t.Error("waits beyond the deadline")
	}
}

func TestAnotherSeedIsNotTheSameAnswer(t *testing.T) {
	p := begun(t, seeded(), ResumeAlways, started(7), tokens(0, nil, 1))
	if _, _, err := p.lose(nil, true); err != nil {
		t.Fatal(err)
	}
	if _, err := p.open(); err != nil {
		t.Fatal(err)
	}
	var lost *LostError
	if _, err := p.receive(started(8)); !errors.As(err, &lost) {
		t.Errorf("%v", err)
	}
}

func TestOnlyFinishedWasLost(t *testing.T) {
	p := begun(t, seeded(), ResumeNever, started(7), tokens(0, stopped(0), 1, 2))
	_, event, err := p.lose(bare(codes.Unavailable), true)
	if err != nil || event.GetFinished().GetUsage().GetCompletionTokens() != 2 || !p.isEnded() {
		t.Errorf("%v %v", event, err)
	}
}

func TestLongRequestIDsStayValid(t *testing.T) {
	request := seeded()
	request.RequestId = strings.Repeat("i", maxRequestIDLength)
	p := begun(t, request, ResumeAlways)
	if _, _, err := p.lose(bare(codes.Internal), true); err != nil {
		t.Fatal(err)
	}
	again, err := p.open()
	if err != nil || len(again.GetRequestId()) != maxRequestIDLength || !strings.HasSuffix(again.GetRequestId(), "/resume-1") {
		t.Errorf("%v %v", again, err)
	}
}

func TestEveryReasonHasAKind(t *testing.T) {
	for number, name := range hotgraphv1.ErrorReason_name {
		if _, ok := kindByReason[hotgraphv1.ErrorReason(number)]; !ok && number != 0 {
			t.Errorf("%s has none", name)
		}
	}
}
