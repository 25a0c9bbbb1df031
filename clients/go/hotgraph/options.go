package hotgraph

// What a client is told about its connection, and gRPC's settings for it.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// DefaultTarget is where the daemon listens when it is told nothing.
const DefaultTarget = "unix:hotgraph.sock"

// Version is that of this package; the user agent tells it.
const Version = "0.1.0"

const (
	maxReceiveBytes   = 64 << 20 // a long completion with log-probabilities is larger than gRPC's default of 4 MiB
	maxAttemptsLimit  = 5        // gRPC takes no more
	retryFirstBackoff = "0.1s"
	retryMaxBackoff   = "2s"
)

// Option is one thing that New is told.
type Option func(*config)

type config struct {
	token            func(context.Context) (string, error)
	tls              *tls.Config
	err              error // of an option
	maxAttempts      int
	waitForReady     bool
	keepalive        time.Duration
	keepaliveTimeout time.Duration
	clientID         string
	allowInsecure    bool
	resume           Resume
	resumePolicy     ResumePolicy
	dialOptions      []grpc.DialOption
}

func defaultConfig() config {
	return config{
		maxAttempts:      4,
		keepalive:        10 * time.Second,
		keepaliveTimeout: 5 * time.Second,
		resumePolicy:     DefaultResumePolicy(),
	}
}

// WithTLS encrypts. A nil config trusts the system's roots; one with certificates is mutual TLS.
func WithTLS(settings *tls.Config) Option {
	return func(c *config) {
		if settings == nil {
			settings = &tls.Config{}
		}
		c.tls = settings.Clone()
	}
}

// WithTLSFiles encrypts, trusting the PEM file rootCertificates alone (empty: the system's). With certificateChain and
// privateKey, both or none, it is mutual TLS.
func WithTLSFiles(rootCertificates, certificateChain, privateKey string) Option {
	return func(c *config) { c.tls, c.err = tlsFromFiles(rootCertificates, certificateChain, privateKey) }
}

func tlsFromFiles(rootCertificates, certificateChain, privateKey string) (*tls.Config, error) {
	settings := &tls.Config{}
	if rootCertificates != "" {
		pem, err := os.ReadFile(rootCertificates)
		if err != nil {
			return nil, err
		}
		settings.RootCAs = x509.NewCertPool()
		if !settings.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("hotgraph: %s: holds no certificate", rootCertificates)
		}
	}
	if (certificateChain == "") != (privateKey == "") {
		return nil, errors.New("hotgraph: mutual TLS needs both a certificate chain and a private key")
	}
	if certificateChain != "" {
		pair, err := tls.LoadX509KeyPair(certificateChain, privateKey)
		if err != nil {
			return nil, err
		}
		settings.Certificates = []tls.Certificate{pair}
	}
	return settings, nil
}

// WithToken sends `authorization: bearer TOKEN` with every call. Over plain TCP to another host New refuses it.
func WithToken(token string) Option {
	return WithTokenSource(func(context.Context) (string, error) { return token, nil })
}

// WithTokenSource asks for the token before each call.
func WithTokenSource(source func(context.Context) (string, error)) Option {
	return func(c *config) { c.token = source }
}

// WithInsecureToken lets a token go over plain TCP to another host, for a path that is safe by other means.
func WithInsecureToken() Option { return func(c *config) { c.allowInsecure = true } }

// WithMaxAttempts bounds how often gRPC sends a call that was not answered yet, 1 to 5 in all; 4 by default.
func WithMaxAttempts(attempts int) Option { return func(c *config) { c.maxAttempts = attempts } }

// WithWaitForReady lets calls wait for a server, up to their deadline, instead of failing at once when there is none.
func WithWaitForReady() Option { return func(c *config) { c.waitForReady = true } }

// WithKeepalive pings after so much silence during calls; a server that does not answer in time is dead. gRPC takes no
// less than ten seconds, which is the default, with a timeout of five.
func WithKeepalive(silence, timeout time.Duration) Option {
	return func(c *config) { c.keepalive, c.keepaliveTimeout = silence, timeout }
}

// WithClientID names the caller to the daemon: AdminService.ListClients shows it.
func WithClientID(id string) Option { return func(c *config) { c.clientID = id } }

// WithResume sets what Generate does when its server is lost; ResumeRepeatable by default.
func WithResume(resume Resume) Option { return func(c *config) { c.resume = resume } }

// WithResumePolicy sets how far Generate goes after a lost server.
func WithResumePolicy(policy ResumePolicy) Option { return func(c *config) { c.resumePolicy = policy } }

// WithDialOptions hands gRPC options of its own; they win over ours.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(c *config) { c.dialOptions = append(c.dialOptions, options...) }
}

func (c *config) check(target string) error {
	switch {
	case c.err != nil:
		return c.err
	case target == "":
		return errors.New("hotgraph: the target is empty")
	case c.maxAttempts < 1 || c.maxAttempts > maxAttemptsLimit:
		return fmt.Errorf("hotgraph: attempts must be 1 to %d, not %d", maxAttemptsLimit, c.maxAttempts)
	case c.keepalive <= 0 || c.keepaliveTimeout <= 0:
		return errors.New("hotgraph: keepalive and its timeout must be positive")
	case c.token != nil && c.tls == nil && !c.allowInsecure && !isLocal(target):
		return fmt.Errorf("hotgraph: a token would go to %s in plain text: use TLS, or WithInsecureToken when the path is safe", target)
	}
	return nil
}

// grpcOptions are those of the connection; the caller's come last and win.
func (c *config) grpcOptions() []grpc.DialOption {
	transport := insecure.NewCredentials()
	if c.tls != nil {
		transport = credentials.NewTLS(c.tls)
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithPerRPCCredentials(callMetadata{c.token, c.clientID}),
		grpc.WithUserAgent("hotgraph-go/" + Version),
		grpc.WithDefaultServiceConfig(serviceConfig(c.maxAttempts)),
		grpc.WithResolvers(addressList{"ipv4"}, addressList{"ipv6"}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceiveBytes), grpc.WaitForReady(c.waitForReady)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: c.keepalive, Timeout: c.keepaliveTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{ // a restarted daemon is found again soon
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithChainUnaryInterceptor(typedUnary),
		grpc.WithChainStreamInterceptor(typedStream),
	}
	return append(options, c.dialOptions...)
}

// callMetadata is what every call carries. That a token goes only where it may was checked by New.
type callMetadata struct {
	token    func(context.Context) (string, error)
	clientID string
}

func (m callMetadata) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	pairs := map[string]string{}
	if m.token != nil {
		token, err := m.token(ctx)
		if err != nil {
			return nil, err
		}
		pairs["authorization"] = "bearer " + token
	}
	if m.clientID != "" {
		pairs["x-client-id"] = m.clientID
	}
	return pairs, nil
}

func (callMetadata) RequireTransportSecurity() bool { return false }

// serviceConfig tells gRPC which calls it tries again by itself: UNAVAILABLE and RESOURCE_EXHAUSTED, up to maxAttempts in
// all, as long as nothing was answered. It waits as long as the server's push-back says, else 0.1 s, 0.2 s, 0.4 s with
// jitter. Throttling: each failure takes one of 20 tokens and each success gives back a fifth of one; at half or less
// nothing is tried again. EvictGraph is never tried again: a second time it would fail although the first one worked.
func serviceConfig(maxAttempts int) string {
	type object = map[string]any
	retried := object{"name": []object{{}}}
	if maxAttempts > 1 { // gRPC refuses a policy of one attempt
		retried["retryPolicy"] = object{
			"maxAttempts":          maxAttempts,
			"initialBackoff":       retryFirstBackoff,
			"maxBackoff":           retryMaxBackoff,
			"backoffMultiplier":    2,
			"retryableStatusCodes": []string{"UNAVAILABLE", "RESOURCE_EXHAUSTED"},
		}
	}
	notRetried := object{"name": []object{{"service": "hotgraph.v1.GraphService", "method": "EvictGraph"}}}
	text, err := json.Marshal(object{
		"methodConfig":    []object{retried, notRetried},
		"retryThrottling": object{"maxTokens": 20, "tokenRatio": 0.2},
	})
	if err != nil {
		panic(err) // numbers and strings alone
	}
	return string(text)
}
