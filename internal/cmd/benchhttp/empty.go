package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"
)

// emptyHandler is a process that does what net/http must do for every request, and nothing else: the ceiling
// of everything built on it. It is a process of its own, as the nodes are.
type emptyHandler struct {
	url   string
	cmd   *exec.Cmd
	stdin io.Closer // its end is the process's
}

func startEmpty() (*emptyHandler, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-serve-empty") // no context: its stdin is its life line
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start empty handler: %w", err)
	}
	e := &emptyHandler{cmd: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		_ = e.stop() // it has not even started
		return nil, fmt.Errorf("start empty handler: %w", err)
	}
	e.url = strings.TrimSpace(line)
	return e, nil
}

func (e *emptyHandler) stop() error {
	if err := e.stdin.Close(); err != nil {
		return fmt.Errorf("stop empty handler: %w", err)
	}
	if err := e.cmd.Wait(); err != nil {
		return fmt.Errorf("stop empty handler: %w", err)
	}
	return nil
}

// emptyMain is the process: it prints its URL, and serves until stdin ends.
func emptyMain(stdin io.Reader, stdout io.Writer) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	// The settings of the store's own server: deadlines cost system calls.
	server := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      3 * time.Minute,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l) // ends with Close
	}()
	fmt.Fprintf(stdout, "http://%s\n", l.Addr())

	if _, err := io.Copy(io.Discard, stdin); err != nil {
		return err
	}
	err = server.Close()
	<-served
	return err
}
