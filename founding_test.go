package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"

	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

// foundingOf returns the record of node id, with a list of nodes a, b, c and so on.
func foundingOf(id uint64, nodes int) *founding {
	f := &founding{Format: foundingFormat, Member: id, Directory: 10 + id, dir: "d"}
	for i := range nodes {
		f.Members = append(f.Members, store.Member{ID: uint64(i + 1), PeerURL: fmt.Sprintf("http://%c:1", 'a'+i)})
	}
	return f
}

func (f *founding) with(change func(*founding)) *founding {
	change(f)
	return f
}

// waits is the answer of a node that has this record.
func (f *founding) waits() peerAnswer {
	return peerAnswer{info: &peerInfo{Node: f.Member, Process: 100 + f.Member, Founding: f}}
}

// What node 1 of three does, given what it hears from 2 and 3.
func TestFounding_Decide(t *testing.T) {
	own := foundingOf(1, 3)
	two, three := foundingOf(2, 3).waits(), foundingOf(3, 3).waits()
	founders := slices.Clone(own.Members)
	for i := range founders {
		founders[i].Directory = 11 + uint64(i)
	}
	cluster := own.clusterID(founders)
	other := slices.Clone(founders) // with a directory of node 1 that is gone
	other[0].Directory = 99
	answer := func(info peerInfo) peerAnswer { return peerAnswer{info: &info} }
	founded := answer(peerInfo{Node: 3, Cluster: fmt.Sprintf("%x", cluster), Founders: founders})
	silent := peerAnswer{err: errors.New("connection refused")}
	const waits, founds = "waits", "founds"
	for _, tt := range []struct {
		name       string
		self       peerAnswer // at its own URL
		two, three peerAnswer
		outcome    string // waits, founds, or part of the refusal
		says       string // part of what it waits for, or of the conflict
		conflict   bool
	}{
		{"all agree", silent, two, three, founds, "", false},
		{"all agree, and it reaches itself", foundingOf(1, 3).waits(), two, three, founds, "", false},
		{"another process at its address", answer(peerInfo{Node: 1, Process: 7, Founding: own}), two, three, waits, "another process answers", true},
		{"one is silent", silent, two, silent, waits, "node 3 (http://c:1): connection refused", false},
		{"one joins", silent, two, answer(peerInfo{Node: 3}), waits, "was started with --join", false},
		{"a shorter list", silent, two, foundingOf(3, 3).with(func(f *founding) { f.Members = f.Members[:2] }).waits(), waits, "has another list, 1=http://a:1,2=http://b:1", true},
		{"another URL in the list", silent, foundingOf(2, 3).with(func(f *founding) { f.Members[0].PeerURL = "http://x:1" }).waits(), three, waits, "has another list", true},
		{"another token", silent, foundingOf(2, 3).with(func(f *founding) { f.Token = "t" }).waits(), three, waits, "has another token", true},
		{"restored, and this one is not", silent, two, foundingOf(3, 3).with(func(f *founding) { f.Backup = "0123456789abcdef" }).waits(), waits, "restored from the backup 0123456789ab", true},
		{"one node at two addresses", silent, two, two, waits, "node 2 answers there", true},
		{"one has founded with it", silent, two, founded, founds, "", false},
		{"one has founded with it, another is silent", silent, silent, founded, founds, "", false},
		{"one has founded with it, and was wiped since", silent, foundingOf(2, 3).with(func(f *founding) { f.Directory = 98 }).waits(), founded, founds, "", false},
		{"one has founded with what it was", silent, two, answer(peerInfo{Node: 3, Cluster: "5", Founders: other}), "node 1 was part of this cluster with another data directory than d", "", false},
		{"two clusters, one with what it was", silent, answer(peerInfo{Node: 2, Cluster: "5", Founders: other}), founded, founds, "", false},
		{"one has founded with it, but something else", silent, two, answer(peerInfo{Node: 3, Cluster: "5", Founders: founders}), "from another list or token", "", false},
		{"founded, and it was removed since", silent, two, answer(peerInfo{Node: 3, Cluster: fmt.Sprintf("%x", cluster), Founders: founders, Removed: []uint64{1}}), "node 1 was removed", "", false},
		{"one has data, and nobody knows this one", silent, two, answer(peerInfo{Node: 3, Cluster: "5"}), "node 3 (http://c:1) has data, of cluster 5, and this node is empty", "", false},
		{"one has data that knows it", silent, two, answer(peerInfo{Node: 3, Cluster: "5", Members: []store.Member{{ID: 1, Directory: 8}}}), "with another data directory", "", false},
		{"an older version, with data", silent, two, answer(peerInfo{Cluster: "5", Members: []store.Member{{ID: 1}, {ID: 2, Directory: 8}}}), "has data, of cluster 5", "", false},
		{"an older version, as empty", silent, two, answer(peerInfo{Cluster: "5", Members: []store.Member{{ID: 1}, {ID: 2}}}), waits, "runs an older version", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			step := own.decide(101, map[uint64]peerAnswer{1: tt.self, 2: tt.two, 3: tt.three})
			switch tt.outcome {
			case founds:
				if step.cluster != cluster || !slices.Equal(step.founders, founders) || step.refusal != nil || len(step.waiting) > 0 {
					t.Errorf("%+v", step)
				}
				return
			case waits:
				if step.refusal != nil || len(step.waiting) != 1 || !strings.Contains(step.waiting[0], tt.says) {
					t.Errorf("%+v", step)
				}
			default:
				if !strings.Contains(fmt.Sprint(step.refusal), tt.outcome) {
					t.Errorf("%v, want %q", step.refusal, tt.outcome)
				}
			}
			if step.cluster != 0 || tt.conflict != (len(step.conflicts) == 1) {
				t.Errorf("cluster %x, conflicts %v", step.cluster, step.conflicts)
			}
		})
	}
	if step := foundingOf(1, 1).decide(101, nil); step.cluster == 0 {
		t.Errorf("one node waits for others: %+v", step)
	}
}

// The number of a cluster depends on everything that was agreed on.
func TestFounding_ClusterID(t *testing.T) {
	seen := map[uint64]string{}
	for name, change := range map[string]func(f *founding){
		"as it is":          func(*founding) {},
		"another token":     func(f *founding) { f.Token = "t" },
		"another backup":    func(f *founding) { f.Backup = "t" },
		"another directory": func(f *founding) { f.Members[1].Directory = 1 },
		"another URL":       func(f *founding) { f.Members[1].PeerURL = "http://x:1" },
		"fewer":             func(f *founding) { f.Members = f.Members[:2] },
	} {
		f := foundingOf(1, 3).with(change)
		id := f.clusterID(f.Members)
		if other, ok := seen[id]; ok || id == 0 {
			t.Errorf("%s: the same number as %s: %x", name, other, id)
		}
		seen[id] = name
	}
}

// Wherever founding breaks off, the next start goes on from there, with the same
// directory number and in the same cluster.
func TestFounding_BreaksOff(t *testing.T) {
	smallSegments(t)
	backup := storetest.SomeState(t)
	for _, restored := range []bool{false, true} {
		for _, point := range []string{"record", "log", "first state", "done"} {
			t.Run(fmt.Sprintf("restored %v, %s", restored, point), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "data")
				cfg := configOf(t, "--id", "1", "--cluster", "http://127.0.0.1:1", "--data-dir", dir)
				s, err := openStorage(dir, zap.NewNop())
				testkit.Must(t, err)
				own := newFounding(&cfg)
				if restored {
					own.Backup = "b"
					backup.Begin(cfg.members, nil)
					testkit.Must(t, s.saveFirstState(&backup))
				}
				testkit.Must(t, s.saveFounding(own))
				founders := own.decide(0, nil).founders
				cluster := own.clusterID(founders)
				if point != "record" {
					rec, err := s.create(identity{Member: 1, Cluster: cluster, Directory: own.Directory, Backup: own.Backup, Founders: founders})
					testkit.Must(t, err)
					if point != "log" {
						testkit.Must(t, s.writeFirstState(rec, founders))
					}
					if point == "first state" {
						testkit.Must(t, s.saveFounding(own)) // its deletion got lost
					}
				}
				testkit.Must(t, s.close())

				s, err = openStorage(dir, zap.NewNop())
				testkit.Must(t, err)
				defer s.close()
				rec, err := s.load()
				testkit.Must(t, err)
				ports := &ports{}
				rec, err = (&place{cfg: cfg, disk: s, around: ports, logger: zap.NewNop()}).find(t.Context(), rec)
				testkit.Must(t, err)
				if rec.identity.Directory != own.Directory || rec.identity.Cluster != cluster || !slices.Equal(rec.identity.Founders, founders) || !rec.untouched() {
					t.Errorf("%+v, want cluster %x", rec.identity, cluster)
				}
				if self := rec.state.Members[1]; self.Directory != own.Directory || self.PeerURL != "http://127.0.0.1:1" {
					t.Errorf("members %+v", rec.state.Members)
				}
				if restored && (rec.state.RV != backup.RV || rec.state.Items.Len() != backup.Items.Len()) {
					t.Errorf("%d keys at version %d", rec.state.Items.Len(), rec.state.RV)
				}
				if _, err := os.Stat(s.path(foundingName)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the record is still there: %v", err)
				}
			})
		}
	}
}

// A node is left out when others of its own members, so many that there is no
// majority without them, are in another cluster.
func TestLeftOut(t *testing.T) {
	members := []store.Member{{ID: 1, PeerURL: "http://a:1"}, {ID: 2}, {ID: 3}, {ID: 4, Learner: true}}
	in := func(node uint64, cluster string) peerAnswer {
		return peerAnswer{info: &peerInfo{Node: node, Cluster: cluster}}
	}
	for _, tt := range []struct {
		name    string
		answers map[uint64]peerAnswer
		want    bool
	}{
		{"nobody answers", nil, false},
		{"one is in another", map[uint64]peerAnswer{2: in(2, "8")}, false},
		{"one and a learner", map[uint64]peerAnswer{2: in(2, "8"), 4: in(4, "8")}, false},
		{"both", map[uint64]peerAnswer{2: in(2, "8"), 3: in(3, "8")}, true},
		{"both, of an older version", map[uint64]peerAnswer{2: in(0, "8"), 3: in(0, "8")}, true},
		{"one has none yet", map[uint64]peerAnswer{2: in(2, "8"), 3: in(3, "")}, false},
		{"one is in this", map[uint64]peerAnswer{2: in(2, "8"), 3: in(3, "7")}, false},
		{"somebody else has the address of one", map[uint64]peerAnswer{2: in(2, "8"), 3: in(5, "8")}, false},
	} {
		err := leftOut(config{id: 1, dataDir: "d"}, 7, members, tt.answers)
		if (err != nil) != tt.want || tt.want && !strings.Contains(err.Error(), "raftrv recover --data-dir d") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// Where a node listens for the others, of which the directory may know more than
// the flags.
func TestConfig_PeerAddress(t *testing.T) {
	rec := &recovered{state: stateWithMembers([]store.Member{{ID: 1, PeerURL: "http://a:1"}, {ID: 2, PeerURL: "http://b:1"}})}
	for _, tt := range []struct {
		name string
		args []string
		rec  *recovered
		want string
	}{
		{"a new node", []string{"--id", "2", "--cluster", "http://a:1,http://x:1"}, nil, "x:1"},
		{"as before", []string{"--id", "2", "--cluster", "http://a:1,http://b:1"}, rec, "b:1"},
		{"its new address", []string{"--id", "2", "--cluster", "http://a:1,http://x:1"}, rec, "x:1"},
		{"another order", []string{"--id", "2", "--cluster", "http://b:1,http://a:1"}, rec, "b:1"},
		{"not in the list", []string{"--id", "2", "--cluster", "http://a:1"}, rec, "b:1"},
		{"its own flag", []string{"--id", "2", "--cluster", "http://a:1", "--listen-peer", "y:1"}, rec, "y:1"},
	} {
		cfg := configOf(t, tt.args...)
		if got, err := cfg.peerAddress(tt.rec); got != tt.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
	cfg := configOf(t, "--id", "4", "--cluster", "http://a:1", "--data-dir", t.TempDir())
	if err := cfg.checkSelf(); err == nil || !strings.Contains(err.Error(), "--id 4 is not in --cluster") {
		t.Error(err)
	}
}

// TestFounding_NoRoom: a disk without room for a cluster is told from one that is broken, and the directory is to be
// kept: with room the node goes on.
func TestFounding_NoRoom(t *testing.T) {
	smallSegments(t)
	dir := t.TempDir()
	cfg := configOf(t, "--id", "1", "--cluster", "http://127.0.0.1:1", "--data-dir", dir)
	own := newFounding(&cfg)
	founders := own.decide(0, nil).founders
	s, err := openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	testkit.Must(t, s.saveFounding(own))
	s.free = func() (uint64, error) { return 1, nil }
	if _, err := s.found(own, 7, founders); !errors.Is(err, errNoSpace) || !strings.Contains(err.Error(), "keep the data directory") {
		t.Errorf("without room: %v", err)
	}
	testkit.Must(t, s.close())

	s, err = openStorage(dir, zap.NewNop())
	testkit.Must(t, err)
	defer s.close()
	rec, err := s.load()
	testkit.Must(t, err)
	rec, err = (&place{cfg: cfg, disk: s, around: &ports{}, logger: zap.NewNop()}).find(t.Context(), rec)
	if err != nil || rec.empty() || rec.identity.Directory != own.Directory {
		t.Errorf("with room: %+v, %v", rec, err)
	}
}
