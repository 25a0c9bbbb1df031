package hotgraph_test

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/grpc"
)

// addresses are those of the daemons that tests/interop started.
type addresses struct {
	Model, Unix, TCP, Cut, Vectors string
	HeadersCut                     string `json:"headers_cut"`
	TLS                            struct {
		Target, Token string
		Roots         string `json:"root_certificates"`
	}
	MutualTLS struct {
		Target string
		Roots  string `json:"root_certificates"`
		Chain  string `json:"certificate_chain"`
		Key    string `json:"private_key"`
	} `json:"mutual_tls"`
	Handover struct{ Target, Drained string }
}

// daemons skips the test when nobody started any.
func daemons(t *testing.T) addresses {
	t.Helper()
	path := os.Getenv("HOTGRAPH_INTEROP")
	if path == "" {
		t.Skip("needs daemons: run clients/go/test.sh under python -m tests.interop, or make test-client-go")
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var found addresses
	if err := json.Unmarshal(content, &found); err != nil {
		t.Fatal(err)
	}
	return found
}

// passed reports a case of tests/interop/cases.json, unless the test has failed.
func passed(t *testing.T, name string) {
	t.Helper()
	if !t.Failed() {
		report(t, "passed "+name)
	}
}

func report(t *testing.T, line string) {
	t.Helper()
	path := os.Getenv("HOTGRAPH_INTEROP_REPORT")
	if path == "" {
		return
	}
	file, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := fmt.Fprintln(file, line); err != nil {
		t.Fatal(err)
	}
}

func TestReportVersions(t *testing.T) {
	report(t, "language Go "+strings.TrimPrefix(runtime.Version(), "go"))
	report(t, "library grpc-go "+grpc.Version)
}
