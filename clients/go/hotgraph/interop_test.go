package hotgraph_test

// The cases of tests/interop/cases.json against real daemons with a real model.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"hotgraph.example/go/hotgraph"
	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

const patience = 60 * time.Second // for what takes a second on a quiet machine

// One pangram with an emoji, all control characters but those that text cannot hold, and NUL.
const strange = "Zwölf Boxkämpfer 漢字 😀 e\u0301 tab\t newline\n return\r bell\a escape\x1b delete\x7f nul\x00 end"

func dial(t *testing.T, target string, options ...hotgraph.Option) *hotgraph.Client {
	t.Helper()
	client, err := hotgraph.New(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// once refuses gRPC's own retries, so that each refusal is seen at once.
var once = hotgraph.WithMaxAttempts(1)

func greedy(prompt string, maxTokens uint32) *hotgraphv1.GenerateRequest {
	return &hotgraphv1.GenerateRequest{
		Prompt:    hotgraph.Text(prompt),
		MaxTokens: proto.Uint32(maxTokens),
		Sampling:  &hotgraphv1.SamplingParams{Temperature: proto.Float32(0)},
		Stop:      &hotgraphv1.StopConditions{IgnoreEos: proto.Bool(true)},
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// refusal is the error that a call must have failed with.
func refusal(t *testing.T, err error, code codes.Code, reason hotgraphv1.ErrorReason) *hotgraph.Error {
	t.Helper()
	var typed *hotgraph.Error
	if !errors.As(err, &typed) {
		t.Fatalf("no error of ours: %v", err)
	}
	if typed.Code != code || typed.Reason != reason || status.Code(err) != code {
		t.Fatalf("wanted %v %v, got %v", code, reason, typed)
	}
	return typed
}

const noReason = hotgraphv1.ErrorReason_ERROR_REASON_UNSPECIFIED

// waitFree waits until no request holds a slot.
func waitFree(t *testing.T, client *hotgraph.Client) {
	t.Helper()
	end := time.Now().Add(patience)
	for {
		s := must[*hotgraphv1.GetStatusResponse](t)(client.Admin.GetStatus(t.Context(), &hotgraphv1.GetStatusRequest{}))
		if s.GetScheduler().GetNumRunning() == 0 && s.GetScheduler().GetNumWaiting() == 0 && s.GetKvCache().GetNumUsedBlocks() == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("slots are still held: %v", s)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func numRunning(t *testing.T, client *hotgraph.Client) uint32 {
	t.Helper()
	return must[*hotgraphv1.GetStatusResponse](t)(client.Admin.GetStatus(t.Context(), &hotgraphv1.GetStatusRequest{})).
		GetScheduler().GetNumRunning()
}

func TestUnary(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix, once)
	t.Run("empty", func(t *testing.T) {
		answer := must[*hotgraphv1.GetStatusResponse](t)(client.Admin.GetStatus(t.Context(), &hotgraphv1.GetStatusRequest{}))
		if answer.GetState() != hotgraphv1.DaemonState_DAEMON_STATE_SERVING || answer.GetModel() != a.Model {
			t.Errorf("not the status of a serving daemon: %v", answer)
		}
		passed(t, "unary_empty")
	})
	t.Run("large", func(t *testing.T) {
		text := strings.Repeat("All that is gold does not glitter; "+"é漢😀 ", 1<<20/45)
		request := &hotgraphv1.TokenizeRequest{Input: &hotgraphv1.TokenizeRequest_Text{Text: text}, AddSpecialTokens: proto.Bool(false)}
		answer := must[*hotgraphv1.TokenizeResponse](t)(client.Inference.Tokenize(t.Context(), request))
		if joined := bytes.Join(answer.GetPieces(), nil); string(joined) != text {
			t.Errorf("%d bytes came back of %d", len(joined), len(text))
		}
		passed(t, "unary_large")
	})
	t.Run("too large", func(t *testing.T) {
		request := &hotgraphv1.TokenizeRequest{Input: &hotgraphv1.TokenizeRequest_Text{Text: strings.Repeat("x", 5<<20)}}
		_, err := client.Inference.Tokenize(t.Context(), request)
		typed := refusal(t, err, codes.ResourceExhausted, hotgraphv1.ErrorReason_ERROR_REASON_MESSAGE_TOO_LARGE)
		if typed.Metadata["limit_bytes"] != fmt.Sprint(4<<20) || typed.Kind() != hotgraph.KindRequest {
			t.Errorf("does not tell the limit: %v %v", typed.Metadata, typed.Kind())
		}
		passed(t, "request_too_large")
	})
	t.Run("text", func(t *testing.T) {
		tokens := must[*hotgraphv1.TokenizeResponse](t)(client.Inference.Tokenize(t.Context(), &hotgraphv1.TokenizeRequest{
			Input: &hotgraphv1.TokenizeRequest_Text{Text: strange}, AddSpecialTokens: proto.Bool(false),
		}))
		back := must[*hotgraphv1.DetokenizeResponse](t)(client.Inference.Detokenize(t.Context(), &hotgraphv1.DetokenizeRequest{
			TokenIds: tokens.GetTokenIds(),
		}))
		if back.GetText() != strange {
			t.Errorf("%q became %q", strange, back.GetText())
		}
		passed(t, "text")
	})
}

func TestGenerate(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix, once)
	t.Run("stream", func(t *testing.T) {
		var kinds []string
		text, numTokens := "", 0
		generation := client.Generate(t.Context(), greedy("The sky is", 12))
		for event, err := range generation.Events() {
			if err != nil {
				t.Fatal(err)
			}
			switch e := event.GetEvent().(type) {
			case *hotgraphv1.GenerateResponse_Started:
				kinds = append(kinds, "started")
			case *hotgraphv1.GenerateResponse_Tokens:
				kinds = append(kinds, "tokens")
				text += e.Tokens.GetText()
				numTokens += len(e.Tokens.GetTokenIds())
			case *hotgraphv1.GenerateResponse_Finished:
				kinds = append(kinds, "finished")
			}
		}
		if order := slices.Compact(slices.Clone(kinds)); !slices.Equal(order, []string{"started", "tokens", "finished"}) {
			t.Errorf("events came as %v", kinds)
		}
		finished := generation.Finished()
		if numTokens != 12 || finished.GetUsage().GetCompletionTokens() != 12 || text != generation.Text() || text == "" {
			t.Errorf("%d tokens, %v, %q", numTokens, finished.GetUsage(), text)
		}
		if finished.GetTimings().GetTotal().AsDuration() <= 0 || finished.GetReceipt().GetNumSteps() == 0 ||
			finished.GetChoices()[0].GetReason() != hotgraphv1.FinishReason_FINISH_REASON_LENGTH {
			t.Errorf("finished without what ran: %v", finished)
		}
		waitFree(t, client)
		passed(t, "stream")
	})
	t.Run("stream is unary", func(t *testing.T) {
		request := &hotgraphv1.GenerateRequest{
			Prompt: hotgraph.Text("Once upon a time"), MaxTokens: proto.Uint32(16), NumChoices: proto.Uint32(2),
			Sampling: &hotgraphv1.SamplingParams{Seed: proto.Uint64(1<<64 - 1), Temperature: proto.Float32(0.8)},
			Output:   &hotgraphv1.OutputOptions{Logprobs: proto.Uint32(2)},
		}
		streamed := must[*hotgraphv1.CompleteResponse](t)(client.Generate(t.Context(), request).Result())
		unary := must[*hotgraphv1.CompleteResponse](t)(client.Complete(t.Context(), request))
		if len(unary.GetChoices()) != 2 || unary.GetSeed() != 1<<64-1 {
			t.Errorf("not what was asked for: %v", unary)
		}
		for i, choice := range unary.GetChoices() {
			other := streamed.GetChoices()[i]
			if !slices.Equal(choice.GetTokenIds(), other.GetTokenIds()) || choice.GetText() != other.GetText() {
				t.Errorf("choice %d: %v by stream, %v at once", i, other, choice)
			}
			if len(choice.GetLogprobs()) != len(choice.GetTokenIds()) || len(other.GetLogprobs()) != len(other.GetTokenIds()) {
				t.Errorf("choice %d has not one log-probability for each token", i)
			}
		}
		passed(t, "stream_is_unary")
	})
	t.Run("chat", func(t *testing.T) {
		request := greedy("", 24)
		request.Stop = nil
		request.Prompt = hotgraph.Chat(hotgraph.System("Be brief."), hotgraph.User("What is the capital of France?"))
		answer := must[*hotgraphv1.CompleteResponse](t)(client.Generate(t.Context(), request).Result())
		if text := answer.GetChoices()[0].GetText(); !strings.Contains(text, "Paris") {
			t.Errorf("not Paris: %q", text)
		}
		passed(t, "chat")
	})
	t.Run("slow reader", func(t *testing.T) {
		request := greedy("The sky is", 40)
		fast := must[*hotgraphv1.CompleteResponse](t)(client.Generate(t.Context(), request).Result())
		generation := client.Generate(t.Context(), request)
		numEvents := 0
		for event, err := range generation.Events() {
			if err != nil {
				t.Fatal(err)
			}
			if event.GetTokens() == nil {
				continue
			}
			if numEvents++; numEvents == 2 {
				must[*hotgraphv1.CompleteResponse](t)(client.Complete(t.Context(), greedy("others", 4)))
				time.Sleep(time.Second)
			}
		}
		if !slices.Equal(generation.Choices()[0].GetTokenIds(), fast.GetChoices()[0].GetTokenIds()) {
			t.Error("a slow reader got other tokens")
		}
		passed(t, "slow_reader")
	})
}

func TestEnds(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix, once)
	t.Run("cancel at once", func(t *testing.T) {
		generation := client.Generate(t.Context(), greedy("The sky is", 1000))
		generation.Close()
		_, err := generation.Recv()
		refusal(t, err, codes.Canceled, noReason)
		waitFree(t, client)
		passed(t, "cancel_at_once")
	})
	t.Run("cancel midway", func(t *testing.T) {
		generation := client.Generate(t.Context(), greedy("The sky is", 1000))
		for event, err := range generation.Events() {
			if err != nil {
				t.Fatal(err)
			}
			if event.GetTokens() != nil && len(generation.Choices()[0].GetTokenIds()) >= 3 {
				if numRunning(t, client) != 1 {
					t.Error("the stream does not hold a slot")
				}
				break
			}
		}
		waitFree(t, client)

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		again := client.Generate(ctx, greedy("The sky is", 1000))
		var last error
		for event, err := range again.Events() {
			if last = err; event.GetTokens() != nil {
				cancel()
			}
		}
		if typed := refusal(t, last, codes.Canceled, noReason); typed.Kind() != hotgraph.KindCancelled || !errors.Is(last, context.Canceled) {
			t.Errorf("not cancelled: %v", last)
		}
		waitFree(t, client)
		passed(t, "cancel_midway")
	})
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
		defer cancel()
		begin := time.Now()
		_, err := client.Generate(ctx, greedy("The sky is", 1000)).Result()
		var typed *hotgraph.Error
		if !errors.As(err, &typed) || typed.Kind() != hotgraph.KindDeadline || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("no deadline: %v", err)
		}
		if took := time.Since(begin); took > 1700*time.Millisecond {
			t.Errorf("ended after %v", took)
		}
		waitFree(t, client)
		passed(t, "deadline")
	})
	t.Run("timeout field", func(t *testing.T) {
		request := greedy("The sky is", 1000)
		request.Timeout = durationpb.New(500 * time.Millisecond)
		_, err := client.Generate(t.Context(), request).Result()
		refusal(t, err, codes.DeadlineExceeded, hotgraphv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED)
		waitFree(t, client)
		passed(t, "timeout_field")
	})
}

func TestErrors(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix, once)
	t.Run("violations", func(t *testing.T) {
		_, err := client.Complete(t.Context(), &hotgraphv1.GenerateRequest{
			RequestId: "no spaces", Prompt: hotgraph.Text(""), MaxTokens: proto.Uint32(0), NumChoices: proto.Uint32(17),
			Sampling: &hotgraphv1.SamplingParams{
				Temperature: proto.Float32(3), TopP: proto.Float32(0), MinP: proto.Float32(2),
				RepetitionPenalty: proto.Float32(0), PresencePenalty: proto.Float32(-3), FrequencyPenalty: proto.Float32(3),
				LogitBias: []*hotgraphv1.LogitBias{{TokenId: 1, Bias: 101}},
			},
			Stop:    &hotgraphv1.StopConditions{Strings: []string{""}},
			Output:  &hotgraphv1.OutputOptions{Logprobs: proto.Uint32(21)},
			Timeout: durationpb.New(-time.Second),
		})
		typed := refusal(t, err, codes.InvalidArgument, hotgraphv1.ErrorReason_ERROR_REASON_INVALID_REQUEST)
		var fields []string
		for _, violation := range typed.Violations {
			fields = append(fields, violation.Field)
			if violation.Description == "" {
				t.Errorf("does not say what is wrong with %s", violation.Field)
			}
		}
		slices.Sort(fields)
		wanted := []string{
			"max_tokens", "num_choices", "output.logprobs", "request_id", "sampling.frequency_penalty",
			"sampling.logit_bias[0].bias", "sampling.min_p", "sampling.presence_penalty", "sampling.repetition_penalty",
			"sampling.temperature", "sampling.top_p", "stop.strings[0]", "text", "timeout",
		}
		if !slices.Equal(fields, wanted) {
			t.Errorf("wrong fields: %v\nwanted: %v", fields, wanted)
		}
		passed(t, "violations")
	})
	t.Run("status message", func(t *testing.T) {
		name := "naïve 😀\t\n\x7f%"
		_, err := client.Inference.GetModel(t.Context(), &hotgraphv1.GetModelRequest{Name: name})
		typed := refusal(t, err, codes.NotFound, hotgraphv1.ErrorReason_ERROR_REASON_MODEL_NOT_FOUND)
		if typed.Resource == nil || typed.Resource.Name != name || !strings.Contains(typed.Message, "naïve 😀") {
			t.Errorf("the name became %+v in %q", typed.Resource, typed.Message)
		}
		passed(t, "status_message")
	})
	t.Run("not found", func(t *testing.T) {
		_, err := client.GraphCache.GetGraph(t.Context(), &hotgraphv1.GetGraphRequest{Name: "graphs/none"})
		typed := refusal(t, err, codes.NotFound, hotgraphv1.ErrorReason_ERROR_REASON_GRAPH_NOT_FOUND)
		if *typed.Resource != (hotgraph.Resource{Type: "hotgraph.v1.Graph", Name: "graphs/none"}) {
			t.Errorf("not the graph: %+v", typed.Resource)
		}
		passed(t, "not_found")
	})
	t.Run("retry info", func(t *testing.T) {
		// What another test captured goes, so that there is something to wait for.
		states := []hotgraphv1.GraphState{hotgraphv1.GraphState_GRAPH_STATE_READY}
		for graph, err := range client.AllGraphs(t.Context(), &hotgraphv1.ListGraphsRequest{States: states}) {
			if err != nil {
				t.Fatal(err)
			}
			evicted := &hotgraphv1.EvictGraphRequest{Name: graph.GetName()}
			must[*hotgraphv1.EvictGraphResponse](t)(client.GraphCache.EvictGraph(t.Context(), evicted))
		}
		request := greedy("The sky is", 4)
		request.NumChoices, request.Sampling.TopK, request.Sampling.Temperature = proto.Uint32(7), proto.Uint32(5), proto.Float32(1)
		request.GraphPolicy = &hotgraphv1.GraphPolicy{Mode: hotgraphv1.GraphMode_GRAPH_MODE_REQUIRE}
		_, err := client.Generate(t.Context(), request).Result()
		typed := refusal(t, err, codes.Unavailable, hotgraphv1.ErrorReason_ERROR_REASON_GRAPH_NOT_READY)
		if !typed.HasRetryAfter || typed.RetryAfter <= 0 || !hotgraph.IsRetryable(err) {
			t.Errorf("does not tell when to come back: %+v", typed)
		}
		passed(t, "retry_info")
	})
	t.Run("unimplemented", func(t *testing.T) {
		for _, method := range []string{"/hotgraph.v1.InferenceService/Dream", "/hotgraph.v1.DreamService/Dream"} {
			err := client.Conn().Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{})
			refusal(t, err, codes.Unimplemented, noReason)
		}
		passed(t, "unimplemented")
	})
	t.Run("client id", func(t *testing.T) {
		named := dial(t, a.Unix, hotgraph.WithClientID("interop-go"))
		must[*hotgraphv1.CompleteResponse](t)(named.Complete(t.Context(), greedy("hello", 1)))
		found := false
		for other, err := range client.AllClients(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			found = found || other.GetName() == "clients/interop-go" && strings.Contains(other.GetUserAgent(), "hotgraph-go/") &&
				other.GetNumRequests() > 0
		}
		if !found {
			t.Error("ListClients does not know the caller")
		}
		passed(t, "client_id")
	})
}

func TestGraphs(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix, once)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var keys []*hotgraphv1.GraphKey
	for _, rows := range []uint32{1, 2, 3} {
		keys = append(keys, &hotgraphv1.GraphKey{
			Tokens: 4, Rows: rows, Sampler: hotgraphv1.SamplerVariant_SAMPLER_VARIANT_GREEDY,
		})
	}
	prewarmed := must[*hotgraphv1.PrewarmGraphsResponse](t)(client.GraphCache.PrewarmGraphs(ctx, &hotgraphv1.PrewarmGraphsRequest{
		Keys: keys, Wait: durationpb.New(30 * time.Second),
	}))
	if len(prewarmed.GetGraphs()) < 2 {
		t.Fatalf("too few buckets for a list of pages: %v", prewarmed)
	}
	ready := prewarmed.GetGraphs()[0]
	if ready.GetState() != hotgraphv1.GraphState_GRAPH_STATE_READY {
		t.Fatalf("not captured: %v", ready)
	}
	t.Run("pages", func(t *testing.T) {
		var names []string
		for graph, err := range client.AllGraphs(ctx, &hotgraphv1.ListGraphsRequest{PageSize: 1}) {
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, graph.GetName())
		}
		whole := must[*hotgraphv1.ListGraphsResponse](t)(client.GraphCache.ListGraphs(ctx, &hotgraphv1.ListGraphsRequest{}))
		slices.Sort(names)
		if unique := slices.Compact(slices.Clone(names)); len(names) != int(whole.GetTotalSize()) || len(unique) != len(names) {
			t.Errorf("pages of one gave %v of %d", names, whole.GetTotalSize())
		}
		for model, err := range client.AllModels(ctx) {
			if err != nil || model.GetId() != a.Model {
				t.Errorf("%v %v", model, err)
			}
		}
		passed(t, "pages")
	})
	t.Run("watch", func(t *testing.T) {
		got := must[*hotgraphv1.GetGraphResponse](t)(client.GraphCache.GetGraph(ctx, &hotgraphv1.GetGraphRequest{Name: ready.GetName()}))
		if !proto.Equal(got.GetGraph().GetKey(), ready.GetKey()) {
			t.Errorf("another graph: %v", got)
		}
		pinned := must[*hotgraphv1.PinGraphResponse](t)(client.GraphCache.PinGraph(ctx, &hotgraphv1.PinGraphRequest{Name: ready.GetName()}))
		if !pinned.GetGraph().GetPin().GetExpireTime().AsTime().After(time.Now()) {
			t.Errorf("not pinned: %v", pinned)
		}
		must[*hotgraphv1.UnpinGraphResponse](t)(client.GraphCache.UnpinGraph(ctx, &hotgraphv1.UnpinGraphRequest{Name: ready.GetName()}))
		wanted := []hotgraphv1.GraphEventType{
			hotgraphv1.GraphEventType_GRAPH_EVENT_TYPE_PLANNED, hotgraphv1.GraphEventType_GRAPH_EVENT_TYPE_PUBLISHED,
			hotgraphv1.GraphEventType_GRAPH_EVENT_TYPE_PINNED, hotgraphv1.GraphEventType_GRAPH_EVENT_TYPE_UNPINNED,
		}
		sequence := uint64(0)
		for event, err := range client.WatchGraphs(ctx, proto.Uint64(0)) {
			if err != nil {
				t.Fatal(err)
			}
			if event.GetSequence() <= sequence {
				t.Errorf("event %d after %d", event.GetSequence(), sequence)
			}
			sequence = event.GetSequence()
			if event.GetGraph().GetName() == ready.GetName() && event.GetType() == wanted[0] {
				wanted = wanted[1:]
			}
			if len(wanted) == 0 {
				break
			}
		}
		passed(t, "graphs")
	})
	t.Run("health", func(t *testing.T) {
		answer := must[*grpc_health_v1.HealthCheckResponse](t)(client.Health.Check(ctx, &grpc_health_v1.HealthCheckRequest{}))
		for state, err := range client.WatchHealth(ctx, "hotgraph.v1.InferenceService") {
			if err != nil || state != grpc_health_v1.HealthCheckResponse_SERVING || answer.GetStatus() != state {
				t.Errorf("%v, watched %v (%v)", answer, state, err)
			}
			break
		}
		_, err := client.Health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "none"})
		refusal(t, err, codes.NotFound, hotgraphv1.ErrorReason_ERROR_REASON_SERVICE_NOT_FOUND)
		passed(t, "health")
	})
}

func TestTransports(t *testing.T) {
	a := daemons(t)
	// check makes a unary call and a stream.
	check := func(t *testing.T, client *hotgraph.Client) {
		t.Helper()
		answer := must[*hotgraphv1.CompleteResponse](t)(client.Complete(t.Context(), greedy("hello", 2)))
		streamed := must[*hotgraphv1.CompleteResponse](t)(client.Generate(t.Context(), greedy("hello", 2)).Result())
		if !slices.Equal(answer.GetChoices()[0].GetTokenIds(), streamed.GetChoices()[0].GetTokenIds()) {
			t.Errorf("%v by stream, %v at once", streamed, answer)
		}
	}
	fails := func(t *testing.T, client *hotgraph.Client, code codes.Code, reason hotgraphv1.ErrorReason) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := client.Complete(ctx, greedy("hello", 1))
		refusal(t, err, code, reason)
	}
	t.Run("tcp", func(t *testing.T) {
		check(t, dial(t, a.TCP))
		check(t, dial(t, "ipv4:127.0.0.1:1,"+a.TCP)) // nobody listens at the first address
		passed(t, "tcp")
	})
	token := hotgraph.WithToken(a.TLS.Token)
	t.Run("tls", func(t *testing.T) {
		check(t, dial(t, a.TLS.Target, hotgraph.WithTLSFiles(a.TLS.Roots, "", ""), token))
		fails(t, dial(t, a.TLS.Target, hotgraph.WithTLS(nil), token, once), codes.Unavailable, noReason)
		fails(t, dial(t, a.TLS.Target, token, once), codes.Unavailable, noReason)
		passed(t, "tls")
	})
	t.Run("token", func(t *testing.T) {
		tls := hotgraph.WithTLSFiles(a.TLS.Roots, "", "")
		for _, wrong := range []hotgraph.Option{hotgraph.WithToken("wrong"), hotgraph.WithClientID("nobody")} {
			fails(t, dial(t, a.TLS.Target, tls, wrong), codes.Unauthenticated, hotgraphv1.ErrorReason_ERROR_REASON_UNAUTHENTICATED)
		}
		passed(t, "token")
	})
	t.Run("mutual tls", func(t *testing.T) {
		m := a.MutualTLS
		check(t, dial(t, m.Target, hotgraph.WithTLSFiles(m.Roots, m.Chain, m.Key)))
		fails(t, dial(t, m.Target, hotgraph.WithTLSFiles(m.Roots, "", ""), once), codes.Unavailable, noReason)
		passed(t, "mutual_tls")
	})
}

func TestTokenInTheClear(t *testing.T) {
	token := hotgraph.WithToken("secret")
	for _, target := range []string{"gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051", "dns:///localhost.example:1"} {
		if _, err := hotgraph.New(target, token); err == nil {
			t.Errorf("a token would go to %s", target)
		}
		dial(t, target, token, hotgraph.WithInsecureToken())
		dial(t, target, token, hotgraph.WithTLS(nil))
	}
	for _, target := range []string{"unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1"} {
		dial(t, target, token)
	}
	passed(t, "token_in_the_clear")
}

func TestResume(t *testing.T) {
	a := daemons(t)
	client := dial(t, a.Unix)
	seeded := greedy("Once upon a time", 64)
	seeded.Sampling = &hotgraphv1.SamplingParams{Seed: proto.Uint64(7), Temperature: proto.Float32(0.9)}
	whole := must[*hotgraphv1.CompleteResponse](t)(client.Generate(t.Context(), seeded).Result())
	same := func(t *testing.T, generation *hotgraph.Generation, answer *hotgraphv1.CompleteResponse) {
		t.Helper()
		wanted, got := whole.GetChoices()[0], answer.GetChoices()[0]
		if generation.NumResumes() == 0 {
			t.Error("the stream was not broken")
		}
		if !slices.Equal(got.GetTokenIds(), wanted.GetTokenIds()) || got.GetText() != wanted.GetText() {
			t.Errorf("the seam shows: %q, unbroken %q", got.GetText(), wanted.GetText())
		}
		if answer.GetUsage().GetCompletionTokens() != whole.GetUsage().GetCompletionTokens() {
			t.Errorf("%v, unbroken %v", answer.GetUsage(), whole.GetUsage())
		}
	}
	t.Run("cut", func(t *testing.T) {
		policy := hotgraph.DefaultResumePolicy()
		policy.MaxLosses = 64
		generation := dial(t, a.Cut).Generate(t.Context(), seeded, hotgraph.ResumingBy(policy))
		same(t, generation, must[*hotgraphv1.CompleteResponse](t)(generation.Result()))

		lost := dial(t, a.Cut).Generate(t.Context(), seeded, hotgraph.Resuming(hotgraph.ResumeNever))
		_, err := lost.Result()
		var loss *hotgraph.LostError
		if !errors.As(err, &loss) || len(loss.Choices[0].GetTokenIds()) == 0 || loss.Started == nil {
			t.Errorf("no loss: %v", err)
		}
		waitFree(t, client)
		passed(t, "cut_and_resume")
	})
	t.Run("headers cut", func(t *testing.T) {
		named := proto.Clone(seeded).(*hotgraphv1.GenerateRequest)
		named.RequestId = "cut"
		generation := dial(t, a.HeadersCut).Generate(t.Context(), named)
		answer := must[*hotgraphv1.CompleteResponse](t)(generation.Result())
		if answer.GetRequestId() != "cut/resume-2" || generation.NumResumes() != 0 {
			t.Errorf("%q, resumed %d times", answer.GetRequestId(), generation.NumResumes())
		}
		if got, wanted := answer.GetChoices()[0], whole.GetChoices()[0]; !slices.Equal(got.GetTokenIds(), wanted.GetTokenIds()) {
			t.Errorf("%q, unbroken %q", got.GetText(), wanted.GetText())
		}

		never := dial(t, a.HeadersCut).Generate(t.Context(), seeded, hotgraph.Resuming(hotgraph.ResumeNever))
		if _, err := never.Result(); status.Code(err) != codes.Unavailable {
			t.Errorf("not cut: %v", err)
		}
		policy := hotgraph.DefaultResumePolicy()
		policy.MaxLosses = 1
		drawn := &hotgraphv1.GenerateRequest{
			Prompt: named.GetPrompt(), RequestId: "drawn", MaxTokens: proto.Uint32(4),
		}
		generation = dial(t, a.HeadersCut).Generate(t.Context(), drawn, hotgraph.ResumingBy(policy))
		answer = must[*hotgraphv1.CompleteResponse](t)(generation.Result())
		if answer.GetRequestId() != "drawn/resume-1" {
			t.Errorf("%q", answer.GetRequestId())
		}
		waitFree(t, client)
		passed(t, "headers_cut")
	})
	t.Run("drain", func(t *testing.T) {
		drained := dial(t, a.Handover.Drained)
		generation := dial(t, a.Handover.Target).Generate(t.Context(), seeded)
		isDrained := false
		for event, err := range generation.Events() {
			if err != nil {
				t.Fatal(err)
			}
			if event.GetTokens() != nil && !isDrained {
				isDrained = true
				answer := must[*hotgraphv1.DrainResponse](t)(drained.Admin.Drain(t.Context(), &hotgraphv1.DrainRequest{
					Grace: durationpb.New(300 * time.Millisecond),
				}))
				if answer.GetState() != hotgraphv1.DaemonState_DAEMON_STATE_DRAINING || answer.GetNumRequests() != 1 {
					t.Errorf("not drained while one ran: %v", answer)
				}
			}
		}
		same(t, generation, must[*hotgraphv1.CompleteResponse](t)(generation.Result()))
		passed(t, "drain_and_resume")
	})
}

func TestSoak(t *testing.T) {
	a := daemons(t)
	call := func(client *hotgraph.Client, text string) error {
		answer, err := client.Inference.Detokenize(t.Context(), &hotgraphv1.DetokenizeRequest{TokenIds: []uint32{504, 6376}})
		if err == nil && answer.GetText() == "" {
			return errors.New("no text")
		}
		return err
	}
	one := dial(t, a.Unix, once)
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for range 25 {
				if err := call(one, "x"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	for range 20 {
		client, err := hotgraph.New(a.Unix, once, hotgraph.WithDialOptions(grpc.WithUserAgent("soak")))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(call(client, "y"), client.Close()); err != nil {
			t.Error(err)
		}
	}
	passed(t, "soak")
}
