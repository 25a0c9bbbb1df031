// The caller without Python: sends requests one at a time, with a pause between, and tells when each message came.
//
// It knows no message: requests come as bytes, one in hexadecimal a line of standard input, and a response is told apart
// by the number of its first field. Standard output is one line of JSON a request, with times in seconds on Linux's
// monotonic clock, which the daemon's side reads too.
package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const maxLineBytes = 1 << 24

// A message of the response: its first field's number, and when it was there.
type message struct {
	Field   int     `json:"field"`
	Seconds float64 `json:"seconds"`
}

type answer struct {
	Sent     float64   `json:"sent"`
	Messages []message `json:"messages"`
	Ended    float64   `json:"ended"`
}

// rawCodec hands bytes through. It calls itself proto, since that is what stands in the call's content type.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(value any) ([]byte, error) {
	data, isBytes := value.(*[]byte)
	if !isBytes {
		return nil, fmt.Errorf("%T is not what this codec takes", value)
	}
	return *data, nil
}

func (rawCodec) Unmarshal(data []byte, value any) error {
	target, isBytes := value.(*[]byte)
	if !isBytes {
		return fmt.Errorf("%T is not what this codec takes", value)
	}
	*target = append((*target)[:0], data...)
	return nil
}

func monotonicSeconds() float64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		panic(err) // every Linux has it
	}
	return float64(now.Nano()) / 1e9
}

// call sends one request and reads its whole stream.
func call(connection *grpc.ClientConn, method string, request []byte, timeout time.Duration) (answer, error) {
	done, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var found answer
	var response []byte
	found.Sent = monotonicSeconds()
	stream, err := connection.NewStream(done, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return found, err
	}
	if err := stream.SendMsg(&request); err != nil {
		return found, err
	}
	if err := stream.CloseSend(); err != nil {
		return found, err
	}
	for {
		err := stream.RecvMsg(&response)
		now := monotonicSeconds()
		if errors.Is(err, io.EOF) {
			found.Ended = now
			return found, nil
		}
		if err != nil {
			return found, err
		}
		if len(response) == 0 || response[0] >= 0x80 {
			return found, errors.New("a response starts with none of the fields that are known")
		}
		found.Messages = append(found.Messages, message{int(response[0] >> 3), now})
	}
}

func run() error {
	target := flag.String("target", "", "address of the daemon, as gRPC has it: unix:/path or host:port")
	method := flag.String("method", "/hotgraph.v1.InferenceService/Generate", "a server-streaming method")
	gap := flag.Duration("gap", 30*time.Millisecond, "pause before each request")
	timeout := flag.Duration("timeout", 30*time.Second, "of one request")
	flag.Parse()
	connection, err := grpc.NewClient(
		*target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})),
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, maxLineBytes)
	var answers []answer
	for lines.Scan() {
		request, err := hex.DecodeString(lines.Text())
		if err != nil {
			return err
		}
		time.Sleep(*gap)
		found, err := call(connection, *method, request, *timeout)
		if err != nil {
			return err
		}
		answers = append(answers, found)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	output := json.NewEncoder(os.Stdout)
	for _, found := range answers { // at the end: writing between two requests would be work beside them
		if err := output.Encode(found); err != nil {
			return err
		}
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
