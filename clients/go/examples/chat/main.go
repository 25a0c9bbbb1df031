// Chat is a conversation with the model in the terminal: one line is one turn, Ctrl-C stops an answer, Ctrl-D ends it.
//
//	go run ./examples/chat -target unix:hotgraph.sock
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"google.golang.org/protobuf/proto"

	"hotgraph.example/go/hotgraph"
	hotgraphv1 "hotgraph.example/go/hotgraph/v1"
)

func main() {
	target := flag.String("target", hotgraph.DefaultTarget, "unix:PATH or HOST:PORT")
	system := flag.String("system", "You are a helpful assistant.", "instructions for the whole conversation")
	temperature := flag.Float64("temperature", 0.7, "0 is greedy")
	maxTokens := flag.Uint("max-tokens", 256, "tokens of an answer, at most")
	seed := flag.Uint64("seed", 0, "of the sampling; 0: drawn by the server")
	roots := flag.String("tls-roots", "", "PEM file of the certificates to trust; turns TLS on")
	chain := flag.String("tls-certificate", "", "PEM file of the client's certificate, for mutual TLS")
	key := flag.String("tls-key", "", "PEM file of the client's key, for mutual TLS")
	flag.Parse()

	var options []hotgraph.Option
	if *roots != "" {
		options = append(options, hotgraph.WithTLSFiles(*roots, *chain, *key))
	}
	if token := os.Getenv("HOTGRAPH_TOKEN"); token != "" {
		options = append(options, hotgraph.WithToken(token))
	}
	client, err := hotgraph.New(*target, options...)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	defer client.Close()

	request := &hotgraphv1.GenerateRequest{
		Sampling:  &hotgraphv1.SamplingParams{Temperature: proto.Float32(float32(*temperature))},
		MaxTokens: proto.Uint32(uint32(*maxTokens)),
	}
	if *seed != 0 {
		request.Sampling.Seed = seed
	}
	if err := chat(client, request, *system, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// chat asks one line after the other, with all that was said before. request has all but the prompt.
func chat(client *hotgraph.Client, request *hotgraphv1.GenerateRequest, system string, in io.Reader, out io.Writer) error {
	messages := []*hotgraphv1.ChatMessage{hotgraph.System(system)}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for {
		fmt.Fprint(out, "> ")
		if !lines.Scan() {
			fmt.Fprintln(out)
			return lines.Err()
		}
		line := strings.TrimSpace(lines.Text())
		if line == "" {
			continue
		}
		messages = append(messages, hotgraph.User(line))
		request.Prompt = hotgraph.Chat(messages...)
		answer, err := say(client, request, out)
		if err != nil {
			return err
		}
		messages = append(messages, hotgraph.Assistant(answer))
	}
}

// say prints one answer as it comes. An interrupt leaves it at what there is.
func say(client *hotgraph.Client, request *hotgraphv1.GenerateRequest, out io.Writer) (string, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	generation := client.Generate(ctx, request)
	for text, err := range generation.Texts() {
		if errors.Is(err, context.Canceled) {
			break
		}
		if err != nil {
			return "", err
		}
		fmt.Fprint(out, text)
	}
	fmt.Fprintln(out)
	return generation.Text(), nil
}
