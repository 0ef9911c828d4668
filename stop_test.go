package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// sentMessages is a transport that keeps what it is given.
type sentMessages struct{ sent []*raftpb.Message }

func (n *sentMessages) send(m []*raftpb.Message)  { n.sent = append(n.sent, m...) }
func (n *sentMessages) setMembers([]store.Member) {}

// newTestLoop returns a loop that does not run, and the replica of member 1 of three for it, with a new
// directory.
func newTestLoop(t *testing.T) (*loop, *replica, *storage, *sentMessages) {
	t.Helper()
	smallSegments(t)
	dir := t.TempDir()
	disk, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	t.Cleanup(func() { testkit.Must(t, disk.close()) })
	rec, err := disk.create(identity{Member: 1, Cluster: 7})
	testkit.Must(t, err)
	for id, url := range map[uint64]string{1: "http://a", 2: "http://b", 3: "http://c"} {
		rec.state.Members[id] = store.Member{ID: id, PeerURL: url}
	}
	rec.state.Index, rec.state.Term = store.FirstIndex, store.FirstTerm
	testkit.Must(t, disk.bootstrap(rec, rec.state))
	l, n := newLoop(10*time.Millisecond, func() {}, zap.NewNop()), &sentMessages{}
	l.interrupt = disk.interrupt
	r, err := newReplica(replicaConfig{id: 1, session: 7, electionTicks: 20, heartbeatTicks: 2, snapshotEntries: 1000, snapshotBytes: 1 << 30,
		catchUpEntries: 100, log: rec.log, store: &store.Store{State: rec.state}, confState: rec.confState, disk: disk, transport: n, driver: l, logger: zap.NewNop()})
	testkit.Must(t, err)
	return l, r, disk, n
}

func admitted(context.Context) error { return nil }

// TestLoop_LeavesWorkBehind: a loop that ends does not wait for work that does not heed the interruption, and
// nobody hears of its result.
func TestLoop_LeavesWorkBehind(t *testing.T) {
	for _, cause := range []string{"stop", "fatal error"} {
		t.Run(cause, func(t *testing.T) {
			l, r, _, _ := newTestLoop(t)
			release := make(chan struct{})
			defer l.work.Wait()
			defer close(release)
			l.background(func() error {
				<-release
				return errors.New("too late")
			}, func(error) error {
				t.Error("the loop was told after its end")
				return nil
			})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			began, want := time.Now(), error(nil)
			if cause == "stop" {
				cancel()
			} else {
				want = errors.New("fatal")
				l.call(func() error { return want })
			}
			if err := l.run(ctx, r, admitted); !errors.Is(err, want) {
				t.Errorf("the loop ended with %v, want %v", err, want)
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("the loop took %v to end", took)
			}
		})
	}
}

// TestLoop_InterruptsSnapshot: a snapshot that is being written when the loop ends is given up, which is no error,
// and nothing of it is left.
func TestLoop_InterruptsSnapshot(t *testing.T) {
	l, r, disk, _ := newTestLoop(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	st := largeState(64 << 20)
	started, result := make(chan struct{}), make(chan error, 1)
	l.background(func() error {
		close(started)
		err := disk.writeSnapshot(snapshotMeta(5), &st)
		result <- err
		return err
	}, func(err error) error { return err })
	go func() {
		<-started
		for len(temporaryFiles(t, disk)) == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	testkit.Must(t, l.run(ctx, r, admitted))
	if err := <-result; !errors.Is(err, errInterrupted) {
		t.Errorf("the snapshot was written to its end: %v", err)
	}
	if left := temporaryFiles(t, disk); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(disk.bodyPath(5)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the body has got its name: %v", err)
	}
}

func temporaryFiles(t *testing.T, s *storage) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(s.path(snapDir), tempPrefix+"*"))
	testkit.Must(t, err)
	return paths
}

// largeState returns a state that holds about so many bytes.
func largeState(size int) store.State {
	st := store.NewState()
	st.Index, st.Term = 5, 1
	value := strings.Repeat("v", 1<<20)
	for i := range size >> 20 {
		st.Put(&store.Command{Key: string(rune('a' + i)), Value: value})
	}
	return st
}

func snapshotMeta(index uint64) *raftpb.Snapshot {
	return &raftpb.Snapshot{Metadata: &raftpb.SnapshotMetadata{Index: new(index), Term: new(uint64(1)), ConfState: &raftpb.ConfState{Voters: []uint64{1}}}}
}

// TestStorage_Interrupt: after it nothing long goes on, neither what has begun nor what begins.
func TestStorage_Interrupt(t *testing.T) {
	smallSegments(t)
	s, _ := newDisk(t, t.TempDir())
	defer func() { testkit.Must(t, s.close()) }()
	st := largeState(1 << 20)
	testkit.Must(t, s.writeSnapshot(snapshotMeta(5), &st))
	s.interrupt()
	s.interrupt() // again is all right
	if _, err := s.readBody(5, 1); !errors.Is(err, errInterrupted) {
		t.Errorf("read: %v", err)
	}
	if err := s.writeSnapshot(snapshotMeta(6), &st); !errors.Is(err, errInterrupted) || len(temporaryFiles(t, s)) > 0 {
		t.Errorf("write: %v, left are %v", err, temporaryFiles(t, s))
	}
	if _, err := s.receive(bytes.NewReader(make([]byte, 1<<20)), 7, 1); !errors.Is(err, errInterrupted) || len(temporaryFiles(t, s)) > 0 {
		t.Errorf("receive: %v, left are %v", err, temporaryFiles(t, s))
	}
	if err := s.purgeSnapshots(6); !errors.Is(err, errInterrupted) {
		t.Errorf("purge: %v", err)
	}
}

// TestStorage_RoomWhileItGrows: a snapshot that is written or received ends when the log's reserve would be touched,
// whoever else fills the disk.
func TestStorage_RoomWhileItGrows(t *testing.T) {
	smallSegments(t)
	s, _ := newDisk(t, t.TempDir())
	defer func() { testkit.Must(t, s.close()) }()
	looks, reserve := 0, floorSegments*segmentBytes()
	s.free = func() (uint64, error) {
		if looks++; looks > 2 {
			return reserve - 1, nil
		}
		return 1 << 40, nil
	}
	st := largeState(8 << 20)
	if err := s.writeSnapshot(snapshotMeta(5), &st); !errors.Is(err, errNoSpace) || looks != 3 || len(temporaryFiles(t, s)) > 0 {
		t.Errorf("write: %v after %d looks, left are %v", err, looks, temporaryFiles(t, s))
	}
	looks = 0
	arriving := bytes.NewReader(make([]byte, 8<<20))
	if _, err := s.receive(arriving, 7, 1); !errors.Is(err, errNoSpace) || arriving.Len() < 4<<20 || len(temporaryFiles(t, s)) > 0 {
		t.Errorf("receive: %v with %d bytes to come, left are %v", err, arriving.Len(), temporaryFiles(t, s))
	}
	looks = 3
	if err := s.writeSnapshot(snapshotMeta(6), &st); !errors.Is(err, errNoSpace) {
		t.Errorf("write without room: %v", err)
	}
}

// TestLoop_Unadmitted: a node that was never admitted looks at no message, also when it stops, since a vote that it
// gave before may be forgotten.
func TestLoop_Unadmitted(t *testing.T) {
	for range 20 {
		l, r, _, n := newTestLoop(t)
		ctx, cancel := context.WithCancel(t.Context())
		err := l.run(ctx, r, func(ctx context.Context) error {
			testkit.Must(t, l.deliver(message{Message: &raftpb.Message{Type: raftpb.MsgVote.Enum(), From: new(uint64(2)), To: new(uint64(1)),
				Term: new(uint64(5)), LogTerm: new(uint64(1)), Index: new(uint64(1))}}))
			cancel()
			return nil
		})
		testkit.Must(t, err)
		if len(n.sent) > 0 {
			t.Fatalf("sent %v", n.sent)
		}
	}
}

// TestBoundStop: a stop that nothing else ends is ended, and one that ends by itself is not.
func TestBoundStop(t *testing.T) {
	for _, ends := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var abandoned atomic.Int64
			cfg := config{abandon: func() { abandoned.Store(time.Now().UnixNano()) }}
			ctx, cancel := context.WithCancel(t.Context())
			ended := cfg.boundStop(ctx, zap.NewNop())
			time.Sleep(time.Hour)
			if abandoned.Load() != 0 {
				t.Fatal("before the stop")
			}
			began := time.Now()
			cancel()
			if ends {
				time.Sleep(time.Second)
				ended()
			}
			time.Sleep(time.Hour)
			want := began.Add(stopTimeout).UnixNano()
			if ends {
				want = 0
			}
			if at := abandoned.Load(); at != want {
				t.Errorf("ends by itself: %v; abandoned at %d instead of %d", ends, at, want)
			}
			if !ends {
				ended()
			}
		})
	}
}

// TestBoundEnd: what is closed last belongs to the stop. A disk that hangs only then must not keep the process.
func TestBoundEnd(t *testing.T) {
	for _, signal := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			abandoned := make(chan struct{})
			cfg := config{abandon: func() { close(abandoned) }}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			end := cfg.boundEnd(ctx, zap.NewNop(), func() error {
				<-abandoned // it hangs
				return nil
			})
			time.Sleep(time.Hour)
			began := time.Now()
			if signal {
				cancel()
				time.Sleep(time.Second) // for what comes before
			}
			testkit.Must(t, end())
			if took := time.Since(began); took != stopTimeout {
				t.Errorf("signal: %v; it took %v", signal, took)
			}
		})
	}
}
