package proc

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// fakeEnv turns the test binary into a node that has flags, a data directory and probes, but no raft. The
// race detector would hold up each of its exits for a second.
var fakeEnv = []string{"RAFTRV_PROC_FAKE=1", "GORACE=atexit_sleep_ms=0"}

func TestMain(m *testing.M) {
	if os.Getenv("RAFTRV_PROC_FAKE") == "" {
		os.Exit(m.Run())
	}
	if err := fakeNode(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fake:", err)
		os.Exit(3)
	}
}

// fakeNode does what this package needs of a node, and says on request what a bad day looks like.
func fakeNode(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()

	fs := flag.NewFlagSet("fake", flag.ContinueOnError)
	id := fs.Uint64("id", 0, "")
	cluster := fs.String("cluster", "", "")
	token := fs.String("cluster-token", "", "")
	port := fs.Int("port", 0, "")
	dataDir := fs.String("data-dir", "", "")
	leader := fs.Uint64("leader", 1, "the leader it names")
	term := fs.Uint64("term", 1, "the term it names")
	deaf := fs.Bool("deaf", false, "ignore SIGTERM")
	broken := fs.Bool("broken", false, "refuse to start")
	if err := fs.Parse(args); err != nil {
		return err
	}
	fmt.Printf("node %d cluster %s token %s\n", *id, *cluster, *token)
	if *broken {
		return fmt.Errorf("disk on fire")
	}
	starts, err := countStart(*dataDir)
	if err != nil {
		return err
	}

	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", *port))
	if err != nil {
		return err
	}
	http.HandleFunc("GET /-/readyz", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("GET /-/v1/status", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(Status{ID: *id, LeaderID: *leader, Term: *term, AppliedIndex: starts, Role: "follower"})
	})
	go func() { fmt.Println(http.Serve(l, nil)) }()

	<-ctx.Done()
	if *deaf {
		select {}
	}
	return nil
}

// countStart counts in the data directory how often the node has started.
func countStart(dir string) (uint64, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	file := filepath.Join(dir, "starts")
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	n, _ := strconv.ParseUint(string(b), 10, 64) // no file: 0
	n++
	return n, os.WriteFile(file, []byte(strconv.FormatUint(n, 10)), 0o600)
}
