package proc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// pollInterval is the pause between two looks at a condition: short beside an election, long
	// beside a request.
	pollInterval = 10 * time.Millisecond
	// probeTimeout bounds one request that asks a node for its state. A node that needs longer counts
	// as one that does not answer.
	probeTimeout = time.Second
	// bodySizeMax bounds what is read of an answer.
	bodySizeMax = 1 << 20
	// logTailLines is how much of a node's log goes into an error.
	logTailLines = 20
)

// client opens a new connection for every request: one that is kept could belong to a process that has
// been killed since.
var client = &http.Client{
	Timeout:   probeTimeout,
	Transport: &http.Transport{DisableKeepAlives: true},
}

// Node is one member of a cluster and, while it runs, its process. Ports and paths stay the same for life.
type Node struct {
	ID                            int
	Host                          string
	RaftPort, HTTPPort, RedisPort int
	// DataDir is passed as --data-dir. It survives a stop or a kill.
	DataDir string
	// LogFile collects what the processes of this node print; a restart appends.
	LogFile string

	cluster *Cluster
	urls    []string // where the raft port of every node was when this one was made
	joins   bool

	mu sync.Mutex
	// proc is what Start started, until Stop, Kill or Wait have seen its end. One that has ended before
	// that has crashed.
	proc *process
}

// process is one run of the binary.
type process struct {
	cmd    *exec.Cmd
	done   chan struct{} // closed by the goroutine that waits for the process
	err    error         // how it ended; read it after done
	paused atomic.Bool   // by Pause; a signal from elsewhere goes unnoticed
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// signal sends sig. That the process has ended meanwhile is no error: it is what most callers want.
func (p *process) signal(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal process %d: %w", p.cmd.Process.Pid, err)
	}
	return nil
}

// kill ends the process and waits until it is gone.
func (p *process) kill() error {
	if err := p.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

// Status is the part of /-/v1/status that the tools read.
type Status struct {
	ID              uint64 `json:"id"`
	LeaderID        uint64 `json:"leaderId"` // 0 while there is none
	Term            uint64 `json:"term"`
	AppliedIndex    uint64 `json:"appliedIndex"`
	ResourceVersion uint64 `json:"resourceVersion"`
	Role            string `json:"role"`
}

// URL is the base URL of the node's HTTP front.
func (n *Node) URL() string { return n.url(n.HTTPPort) }

// RaftURL is where the node listens for its peers.
func (n *Node) RaftURL() string { return n.url(n.RaftPort) }

func (n *Node) url(port int) string {
	return "http://" + net.JoinHostPort(n.Host, strconv.Itoa(port))
}

// Start starts the node's process and returns without waiting for it to be ready.
func (n *Node) Start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.proc == nil:
	case n.proc.running():
		return fmt.Errorf("start node %d: already running", n.ID)
	default:
		return n.crashError(n.proc)
	}

	log, err := os.OpenFile(n.LogFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start node %d: %w", n.ID, err)
	}
	defer log.Close() // the process has a descriptor of its own

	opts := &n.cluster.opts
	command := append([]string{opts.Binary}, n.args()...)
	if opts.Wrap != nil {
		command = append(opts.Wrap(n), command...)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = n.cluster.dir
	cmd.Env = append(os.Environ(), opts.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = sysProcAttr()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start node %d: %w", n.ID, err)
	}

	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() { // ends with the process, which Stop, Kill and Wait wait for
		p.err = cmd.Wait()
		close(p.done)
	}()
	n.proc = p
	return nil
}

func (n *Node) args() []string {
	opts := &n.cluster.opts
	peers := slices.Clone(n.urls)
	peers[n.ID-1] = n.RaftURL() // which a test may have changed
	if opts.PeerURLs != nil {
		peers = opts.PeerURLs(n, peers)
	}
	args := []string{
		"--id", strconv.Itoa(n.ID),
		"--cluster", strings.Join(peers, ","),
		"--port", strconv.Itoa(n.HTTPPort),
		"--data-dir", n.DataDir,
	}
	if opts.Token != "" {
		args = append(args, "--cluster-token", opts.Token)
	}
	if opts.Host != nil {
		args = append(args, "--listen", net.JoinHostPort(n.Host, strconv.Itoa(n.HTTPPort)))
	}
	if n.joins {
		args = append(args, "--join")
	}
	args = append(args, opts.Args...)
	if opts.NodeArgs != nil {
		args = append(args, opts.NodeArgs(n)...)
	}
	return args
}

// Stop asks the process to leave (SIGTERM) and waits until it has. One that is still there when ctx ends is
// killed, which is an error, as is an exit status other than 0. Stopping a node that has been stopped or was
// never started does nothing; that it had crashed is an error.
func (n *Node) Stop(ctx context.Context) error {
	p, err := n.takeProcess()
	if p == nil {
		return err
	}
	// A paused process sees the first signal after the second.
	if err := errors.Join(p.signal(syscall.SIGTERM), p.signal(syscall.SIGCONT)); err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("stop node %d: still running, killed: %w", n.ID, context.Cause(ctx)), p.kill())
	}
	if p.err != nil {
		return fmt.Errorf("stop node %d: %w\n%s", n.ID, p.err, n.LogTail())
	}
	return nil
}

// Kill ends the process as the kernel's out-of-memory killer would (SIGKILL), paused or not, and waits until
// it is gone. Like Stop it does nothing without a process, and says when the node had crashed.
func (n *Node) Kill() error {
	p, err := n.takeProcess()
	if p == nil {
		return err
	}
	return p.kill()
}

// takeProcess leaves the node without a process and returns the one that it had, or nil if there is none to
// end: never started, ended already, or crashed, which is the error.
func (n *Node) takeProcess() (*process, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.proc
	n.proc = nil
	if p != nil && !p.running() {
		return nil, n.crashError(p)
	}
	return p, nil
}

func (n *Node) crashError(p *process) error {
	return fmt.Errorf("node %d ended by itself: %s\n%s", n.ID, p.cmd.ProcessState, n.LogTail())
}

// Pause freezes the process (SIGSTOP) and waits until it stands still: its connections stay open and nobody
// answers on them.
func (n *Node) Pause() error {
	p := n.process()
	if p == nil {
		return fmt.Errorf("pause node %d: not running", n.ID)
	}
	p.paused.Store(true)
	if err := p.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return poll(context.Background(), p.done, func() error {
		ok, err := frozen(p.cmd.Process.Pid)
		if err == nil && !ok {
			err = fmt.Errorf("pause node %d: still running", n.ID)
		}
		return err
	})
}

// Resume lets a paused process go on (SIGCONT).
func (n *Node) Resume() error {
	p := n.process()
	if p == nil {
		return fmt.Errorf("resume node %d: not running", n.ID)
	}
	p.paused.Store(false)
	return p.signal(syscall.SIGCONT)
}

// Running reports whether the node has a process, paused or not.
func (n *Node) Running() bool {
	p := n.process()
	return p != nil && p.running()
}

// PID returns the process id, or 0 without a process.
func (n *Node) PID() int {
	p := n.process()
	if p == nil || !p.running() {
		return 0
	}
	return p.cmd.Process.Pid
}

func (n *Node) process() *process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc
}

// Wait waits until the process ends by itself and returns how: nil for status 0, an *[exec.ExitError]
// otherwise. It is how a test sees a node refuse to start; an end that was waited for is not a crash.
func (n *Node) Wait(ctx context.Context) error {
	p := n.process()
	if p == nil {
		return fmt.Errorf("wait for node %d: not running", n.ID)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for node %d: %w", n.ID, context.Cause(ctx))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == p {
		n.proc = nil
	}
	return p.err
}

// WaitReady waits until the node says that it knows a leader and is caught up. It fails at once when the
// process ends.
func (n *Node) WaitReady(ctx context.Context) error {
	p := n.process()
	if p == nil {
		return fmt.Errorf("wait until node %d is ready: not running", n.ID)
	}
	err := poll(ctx, p.done, func() error {
		_, err := n.get(ctx, "/-/readyz")
		return err
	})
	if err != nil && !p.running() {
		return n.crashError(p)
	}
	if err != nil {
		return fmt.Errorf("wait until node %d is ready: %w\n%s", n.ID, err, n.LogTail())
	}
	return nil
}

// Status asks the node once for its view of the cluster. One that is paused or not running is not asked.
func (n *Node) Status(ctx context.Context) (Status, error) {
	if p := n.process(); p == nil || !p.running() || p.paused.Load() {
		return Status{}, fmt.Errorf("status of node %d: paused or not running", n.ID)
	}
	var s Status
	body, err := n.get(ctx, "/-/v1/status")
	if err != nil {
		return s, fmt.Errorf("status of node %d: %w", n.ID, err)
	}
	if err := json.Unmarshal(body, &s); err != nil {
		return s, fmt.Errorf("status of node %d: %w", n.ID, err)
	}
	return s, nil
}

// get returns the body of a 200 answer.
func (n *Node) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.URL()+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, bodySizeMax))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s: %s", path, res.Status, bytes.TrimSpace(body))
	}
	return body, nil
}

// LogTail returns the last lines of the node's log, for people.
func (n *Node) LogTail() string {
	b, err := os.ReadFile(n.LogFile)
	if err != nil {
		return fmt.Sprintf("(no log: %v)", err)
	}
	lines := bytes.Split(bytes.TrimRight(b, "\n"), []byte("\n"))
	if extra := len(lines) - logTailLines; extra > 0 {
		lines = lines[extra:]
	}
	return fmt.Sprintf("--- end of the log of node %d\n%s\n---", n.ID, bytes.Join(lines, []byte("\n")))
}

// poll calls check until it returns nil, ctx ends or gone is closed (nil never is); then the last answer of
// check says what was missing.
func poll(ctx context.Context, gone <-chan struct{}, check func() error) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last answer: %w", context.Cause(ctx), err)
		case <-gone:
			return err
		case <-tick.C:
		}
	}
}
