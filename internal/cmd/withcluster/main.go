// Withcluster runs a command against a raftrv cluster: the one that the caller has already started, or three
// nodes that live as long as the command.
//
//	go run ./internal/cmd/withcluster [-own] [-binary ./raftrv] -- COMMAND [ARGUMENT...]
//
// The command finds the nodes in RAFTRV_URLS, separated by commas. If that is set already, it stays as it is
// and nothing is started; otherwise the cluster on the ports of the Procfile is used if all of it answers.
// The exit status is the command's, or 1 if the cluster failed it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"raftrv/internal/proc"
)

const (
	urlsEnv = "RAFTRV_URLS"
	// lookTimeout bounds the look for a running cluster, startTimeout the start of an own one.
	lookTimeout  = time.Second
	startTimeout = 30 * time.Second
	// interruptTimeout is how long the command may go on after Ctrl-C. k6 writes its summary then.
	interruptTimeout = 10 * time.Second
)

// procfileURLs are the nodes of the Procfile.
var procfileURLs = []string{"http://127.0.0.1:12380", "http://127.0.0.1:22380", "http://127.0.0.1:32380"}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "withcluster:", err)
		code = 1
	}
	os.Exit(code)
}

// run returns the exit status of the command, unless the error says why there is none or why it does not count.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	flags := flag.NewFlagSet("withcluster", flag.ContinueOnError)
	flags.SetOutput(stderr)
	own := flags.Bool("own", false, "start a cluster even if one is running")
	binary := flags.String("binary", "./raftrv", "executable of the own cluster's nodes")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	command := flags.Args()
	if len(command) == 0 {
		return 0, errors.New("no command given: withcluster [-own] [-binary ./raftrv] -- COMMAND [ARGUMENT...]")
	}

	if !*own {
		if urls := runningCluster(ctx); urls != "" {
			fmt.Fprintln(stderr, "withcluster: using the running cluster at", urls)
			return runCommand(ctx, command, urls, stdout, stderr)
		}
	}
	return runOwn(ctx, *binary, command, stdout, stderr)
}

// runningCluster returns the value of RAFTRV_URLS that describes a cluster which is already there, or "".
func runningCluster(ctx context.Context) string {
	if urls := os.Getenv(urlsEnv); urls != "" {
		return urls
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	for _, url := range procfileURLs {
		if !ready(ctx, url) {
			return ""
		}
	}
	return strings.Join(procfileURLs, ",")
}

func ready(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/-/readyz", nil)
	if err != nil {
		return false
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// runOwn runs the command against a cluster of its own.
func runOwn(ctx context.Context, binary string, command []string, stdout, stderr io.Writer) (code int, err error) {
	cluster, err := proc.NewCluster(proc.Options{Binary: binary})
	if err != nil {
		return 0, fmt.Errorf("%w (make raftrv builds it)", err)
	}
	// Stop names the nodes that crashed meanwhile, which may be why the command failed.
	defer func() { err = errors.Join(err, cluster.Stop()) }()

	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := cluster.Start(startCtx); err != nil {
		return 0, err
	}
	urls := strings.Join(cluster.URLs(), ",")
	fmt.Fprintln(stderr, "withcluster: started a cluster at", urls)

	code, err = runCommand(ctx, command, urls, stdout, stderr)
	if code != 0 {
		for _, n := range cluster.Nodes {
			fmt.Fprintln(stderr, n.LogTail())
		}
	}
	return code, err
}

func runCommand(ctx context.Context, command []string, urls string, stdout, stderr io.Writer) (int, error) {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = append(os.Environ(), urlsEnv+"="+urls)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// On a terminal Ctrl-C has reached the command before us; a kill of us alone has not.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = interruptTimeout

	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return exit.ExitCode(), nil // it has said itself what went wrong
	}
	return 0, err
}
