package hotgraph

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"iter"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

// Client is a connection to a daemon. Goroutines share it. Its stubs' errors are *Error.
type Client struct {
	Inference  hotgraphv1.InferenceServiceClient
	GraphCache hotgraphv1.GraphServiceClient
	Admin      hotgraphv1.AdminServiceClient
	Health     grpc_health_v1.HealthClient

	config config
	conn   *grpc.ClientConn
	ctx    context.Context // until Close
	close  context.CancelFunc
}

// New makes a client; it connects with the first call. target: unix:PATH, HOST:PORT, ipv4:10.0.0.1:50051,10.0.0.2:50051 or
// any other name that gRPC resolves. It fails for what cannot work or is not safe.
func New(target string, options ...Option) (*Client, error) {
	c := &Client{config: defaultConfig()}
	for _, option := range options {
		option(&c.config)
	}
	if err := c.config.check(target); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(target, c.config.grpcOptions()...)
	if err != nil {
		return nil, err
	}
	c.conn = conn
	c.ctx, c.close = context.WithCancel(context.Background())
	c.Inference = hotgraphv1.NewInferenceServiceClient(conn)
	c.GraphCache = hotgraphv1.NewGraphServiceClient(conn)
	c.Admin = hotgraphv1.NewAdminServiceClient(conn)
	c.Health = grpc_health_v1.NewHealthClient(conn)
	return c, nil
}

// Conn is the connection, for calls that this package does not know.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Close ends every call and the connection.
func (c *Client) Close() error {
	c.close() // first: a generation would take the end of the connection for a lost server
	return c.conn.Close()
}

// GenerateOption is for one generation.
type GenerateOption func(*generateOptions)

type generateOptions struct {
	resume Resume
	policy ResumePolicy
}

// Resuming says when this generation goes on after a lost server, instead of what the client was told.
func Resuming(resume Resume) GenerateOption { return func(o *generateOptions) { o.resume = resume } }

// ResumingBy says how far this generation goes after a lost server, instead of what the client was told.
func ResumingBy(policy ResumePolicy) GenerateOption {
	return func(o *generateOptions) { o.policy = policy }
}

// Generate starts a generation. It ends when all is read, when its Close is called, and when ctx is done; one of them must
// happen. The request is not to be changed while it runs.
func (c *Client) Generate(
	ctx context.Context, request *hotgraphv1.GenerateRequest, options ...GenerateOption,
) *Generation {
	o := generateOptions{c.config.resume, c.config.resumePolicy}
	for _, option := range options {
		option(&o)
	}
	return newGeneration(ctx, c, request, o.resume, o.policy)
}

// Complete generates and answers once, with all of it. It is one unary call, which gRPC sends again when the server is not
// reached; Generate(...).Result() goes on after a lost server as well.
func (c *Client) Complete(
	ctx context.Context, request *hotgraphv1.GenerateRequest, options ...grpc.CallOption,
) (*hotgraphv1.CompleteResponse, error) {
	packed, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	unary := &hotgraphv1.CompleteRequest{} // the same field by field
	if err := proto.Unmarshal(packed, unary); err != nil {
		return nil, err
	}
	return c.Inference.Complete(ctx, unary, options...)
}

// Text is a prompt to continue.
func Text(text string) *hotgraphv1.GenerateRequest_Text {
	return &hotgraphv1.GenerateRequest_Text{Text: text}
}

// TokenIDs is a prompt of token ids, taken as they are.
func TokenIDs(ids ...uint32) *hotgraphv1.GenerateRequest_TokenIds {
	return &hotgraphv1.GenerateRequest_TokenIds{TokenIds: &hotgraphv1.TokenIds{Ids: ids}}
}

// Chat is a conversation, oldest turn first.
func Chat(messages ...*hotgraphv1.ChatMessage) *hotgraphv1.GenerateRequest_Chat {
	return &hotgraphv1.GenerateRequest_Chat{Chat: &hotgraphv1.ChatPrompt{Messages: messages}}
}

// System is a turn with instructions for the whole conversation.
func System(text string) *hotgraphv1.ChatMessage {
	return turn(hotgraphv1.ChatRole_CHAT_ROLE_SYSTEM, text)
}

// User is a turn of who asks.
func User(text string) *hotgraphv1.ChatMessage { return turn(hotgraphv1.ChatRole_CHAT_ROLE_USER, text) }

// Assistant is a turn of the model.
func Assistant(text string) *hotgraphv1.ChatMessage {
	return turn(hotgraphv1.ChatRole_CHAT_ROLE_ASSISTANT, text)
}

func turn(role hotgraphv1.ChatRole, text string) *hotgraphv1.ChatMessage {
	return &hotgraphv1.ChatMessage{Role: role, Content: text}
}

// AllModels are the models that can be asked for, of all pages. An error is the last.
func (c *Client) AllModels(ctx context.Context) iter.Seq2[*hotgraphv1.Model, error] {
	return pages(func(token string) ([]*hotgraphv1.Model, string, error) {
		page, err := c.Inference.ListModels(ctx, &hotgraphv1.ListModelsRequest{PageToken: token})
		return page.GetModels(), page.GetNextPageToken(), err
	})
}

// AllGraphs are the entries of the graph cache in one of the states, or all, most hits first. The request's page size is how
// many come at once. An error is the last.
func (c *Client) AllGraphs(
	ctx context.Context, request *hotgraphv1.ListGraphsRequest,
) iter.Seq2[*hotgraphv1.Graph, error] {
	return pages(func(token string) ([]*hotgraphv1.Graph, string, error) {
		next := proto.Clone(request).(*hotgraphv1.ListGraphsRequest)
		next.PageToken = token
		page, err := c.GraphCache.ListGraphs(ctx, next)
		return page.GetGraphs(), page.GetNextPageToken(), err
	})
}

// AllClients are those who called since the daemon's start. An error is the last.
func (c *Client) AllClients(ctx context.Context) iter.Seq2[*hotgraphv1.Client, error] {
	return pages(func(token string) ([]*hotgraphv1.Client, string, error) {
		page, err := c.Admin.ListClients(ctx, &hotgraphv1.ListClientsRequest{PageToken: token, PageSize: 1000})
		return page.GetClients(), page.GetNextPageToken(), err
	})
}

func pages[T any](list func(token string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for token := ""; ; {
			items, next, err := list(token)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, item := range items {
				if !yield(item, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			token = next
		}
	}
}

// WatchGraphs are the events of the graph cache as they happen, until the loop is left or ctx is done. after: kept events
// after this sequence number first, 0 for all; nil: only what happens from now on. A watch that lost its server ends with an
// error; watch again after the last sequence number.
func (c *Client) WatchGraphs(ctx context.Context, after *uint64) iter.Seq2[*hotgraphv1.GraphEvent, error] {
	return watch(ctx, c.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[hotgraphv1.WatchGraphsResponse], error) {
		return c.GraphCache.WatchGraphs(ctx, &hotgraphv1.WatchGraphsRequest{AfterSequence: after})
	}, (*hotgraphv1.WatchGraphsResponse).GetEvent)
}

// WatchHealth is the health now, and again whenever it changes: of the daemon (""), of one service, or of "hotgraph.warm".
func (c *Client) WatchHealth(
	ctx context.Context, service string,
) iter.Seq2[grpc_health_v1.HealthCheckResponse_ServingStatus, error] {
	return watch(ctx, c.ctx, func(ctx context.Context) (grpc.ServerStreamingClient[grpc_health_v1.HealthCheckResponse], error) {
		return c.Health.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	}, (*grpc_health_v1.HealthCheckResponse).GetStatus)
}

func watch[M, T any](
	ctx, client context.Context, open func(context.Context) (grpc.ServerStreamingClient[M], error), decode func(*M) T,
) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(client, cancel)()
		var none T
		stream, err := open(ctx)
		if err != nil {
			yield(none, err)
			return
		}
		for {
			message, err := stream.Recv()
			switch {
			case errors.Is(err, io.EOF):
				return
			case err != nil:
				yield(none, err)
				return
			case !yield(decode(message), nil):
				return
			}
		}
	}
}

// withSessionKey adds the metadata that a balancer hashes; a key that no header may hold goes as its SHA-256.
func withSessionKey(ctx context.Context, request any) context.Context {
	keyed, ok := request.(interface{ GetSessionKey() string })
	if !ok || keyed.GetSessionKey() == "" {
		return ctx
	}
	key := keyed.GetSessionKey()
	isPlain := strings.TrimSpace(key) == key && strings.IndexFunc(key, func(r rune) bool { return r < ' ' || r > '~' }) < 0
	if !isPlain {
		sum := sha256.Sum256([]byte(key))
		key = hex.EncodeToString(sum[:])
	}
	return metadata.AppendToOutgoingContext(ctx, "session_id", key)
}
