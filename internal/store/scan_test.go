package store

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// tester is what a test and a property have in common.
type tester interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
	Errorf(string, ...any)
}

// writer applies commands to a store, one entry each.
type writer struct {
	t     tester
	store *Store
	seq   uint64
	now   int64
}

func (w *writer) apply(c Command) Result {
	w.t.Helper()
	w.seq++
	var out []Result
	_, err := w.store.Apply(w.store.Applied()+1, 1, BatchHeader{Session: 1, Seq: w.seq, Time: w.now}, c.AppendTo(nil), &out)
	if err != nil {
		w.t.Fatal(err)
	}
	return out[0]
}

func (w *writer) put(key, value string) uint64 {
	return w.apply(Command{Op: OpPut, Key: key, Value: value}).RV
}

// A scan sees what was there when it began, whatever is written while it reads.
func TestScan_SeesOneVersion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &writer{t: t, store: New()}
		key := rapid.Custom(func(t *rapid.T) string {
			return fmt.Sprintf("%c/%04d", rapid.RuneFrom([]rune("abc")).Draw(t, "prefix"), rapid.IntRange(0, 1500).Draw(t, "n"))
		})
		model := map[string]Item{}
		write := func(c Command) {
			r := w.apply(c)
			switch r.Status {
			case StatusCreated:
				model[c.Key] = Item{Value: c.Value, RV: r.RV, Created: r.RV}
			case StatusReplaced:
				model[c.Key] = Item{Value: c.Value, RV: r.RV, Created: model[c.Key].Created}
			case StatusDeleted:
				maps.DeleteFunc(model, func(k string, _ Item) bool {
					return k == c.Key || c.Op == OpDeletePrefix && strings.HasPrefix(k, c.Key)
				})
			}
		}
		// Enough that a scan takes several parts, with what changes lying between
		// them, in them, and around them.
		for i := range rapid.IntRange(0, 4000).Draw(t, "items") {
			write(Command{Op: OpPut, Key: fmt.Sprintf("%c/%04d", "abc"[i%3], i/3), Value: fmt.Sprint(i)})
		}
		type open struct {
			*Scan
			want []KeyItem
		}
		var scans []*open
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				for range rapid.IntRange(1, 300).Draw(t, "writes") {
					k := key.Draw(t, "key")
					if rapid.Bool().Draw(t, "put") {
						write(Command{Op: OpPut, Key: k, Value: fmt.Sprint(w.seq)})
					} else {
						write(Command{Op: OpDelete, Key: k})
					}
				}
			},
			"delete prefix": func(t *rapid.T) {
				k := key.Draw(t, "prefix")
				write(Command{Op: OpDeletePrefix, Key: k[:rapid.IntRange(1, 5).Draw(t, "length")]})
			},
			"begin": func(t *rapid.T) {
				prefix, after := "", ""
				if rapid.Bool().Draw(t, "has prefix") {
					prefix = key.Draw(t, "prefix")[:2]
				}
				if rapid.Bool().Draw(t, "has after") {
					after = key.Draw(t, "after")
				}
				sc, err := w.store.Scan(prefix, after)
				if err != nil {
					t.Skip("too many")
				}
				scans = append(scans, &open{sc, modelList(model, prefix, after)})
			},
			"read": func(t *rapid.T) {
				if len(scans) == 0 {
					t.Skip("none")
				}
				i := rapid.IntRange(0, len(scans)-1).Draw(t, "scan")
				sc := scans[i]
				got, err := sc.Read()
				if err != nil {
					t.Fatal(err)
				}
				if len(got) > len(sc.want) || !slices.Equal(got, sc.want[:len(got)]) || len(got) == 0 && len(sc.want) > 0 {
					t.Fatalf("read %d items that differ from the next of %d", len(got), len(sc.want))
				}
				if len(got) > 2*ScanPart {
					t.Fatalf("%d items in one part", len(got))
				}
				if sc.want = sc.want[len(got):]; len(got) == 0 {
					sc.Close()
					scans = slices.Delete(scans, i, i+1)
				}
			},
			"restore": func(t *rapid.T) {
				w.store.Restore(w.store.Snapshot())
			},
			"": func(t *rapid.T) {
				for _, sc := range scans {
					if sc.ended && sc.old.Len() > 0 || sc.old.Len() == 0 && sc.oldSize != 0 {
						t.Fatalf("keeps %d items, %d bytes", sc.old.Len(), sc.oldSize)
					}
				}
			},
		})
	})
}

// modelList is the plain way to list.
func modelList(model map[string]Item, prefix, after string) []KeyItem {
	var list []KeyItem
	for _, k := range slices.Sorted(maps.Keys(model)) {
		if strings.HasPrefix(k, prefix) && (after == "" || k > after) {
			list = append(list, KeyItem{k, model[k]})
		}
	}
	return list
}

// The same with goroutines, for the race detector.
func TestScan_BesideWrites(t *testing.T) {
	w := &writer{t: t, store: New()}
	const n = 20_000
	for i := range n {
		w.put(fmt.Sprintf("%05d", i), "old")
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for range 5 {
				sc, err := w.store.Scan("", "")
				if err != nil {
					t.Error(err)
					return
				}
				rv, last, count := sc.RV, "", 0
				for {
					part, err := sc.Read()
					if err != nil {
						t.Error(err)
					}
					if len(part) == 0 {
						break
					}
					for _, it := range part {
						if it.RV > rv || it.Key <= last {
							t.Errorf("%q at %d after %q, of a scan at %d", it.Key, it.RV, last, rv)
						}
						last = it.Key
					}
					count += len(part)
				}
				if count != n {
					t.Errorf("%d items, want %d", count, n)
				}
				sc.Close()
			}
		})
	}
	go func() { wg.Wait(); close(stop) }()
	for {
		select {
		case <-stop:
			return
		default:
			w.put(fmt.Sprintf("%05d", rand.IntN(n)), "new")
		}
	}
}

func TestScan_Limits(t *testing.T) {
	w := &writer{t: t, store: New()}
	value := strings.Repeat("v", 1<<20)
	const n = 70
	for i := range n {
		w.put(fmt.Sprintf("k%02d", i), value)
	}
	slow, err := w.store.Scan("", "")
	if err != nil {
		t.Fatal(err)
	}
	other, err := w.store.Scan("x", "") // for which nothing is kept
	if err != nil {
		t.Fatal(err)
	}
	for i := range n { // half of what may be kept is this one's
		w.put(fmt.Sprintf("k%02d", i), "new")
		if i < 30 && slow.err != nil {
			t.Fatalf("ended after %d: %v", i, slow.err)
		}
	}
	if _, err := slow.Read(); !errors.Is(err, errScanSlow) || slow.old != nil {
		t.Error(err)
	}
	if part, err := other.Read(); err != nil || len(part) > 0 {
		t.Error(part, err)
	}
	slow.Close()
	slow.Close() // is harmless
	other.Close()
	if n := len(w.store.State.Scans); n != 0 {
		t.Errorf("%d scans are left", n)
	}

	for range ScansMax {
		if _, err := w.store.Scan("", ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.store.Scan("", ""); !errors.Is(err, errScans) {
		t.Error(err)
	}
}

func BenchmarkScan(b *testing.B) {
	w := &writer{t: b, store: New()}
	for i := range 1_000_000 {
		w.put(fmt.Sprintf("key-%07d", i), strings.Repeat("v", 64))
	}
	w.store.State.Events = newEventLog()
	runtime.GC()
	buf := make([]byte, 0, 1<<20)
	for _, encode := range []bool{false, true} {
		b.Run(fmt.Sprintf("encode=%v", encode), func(b *testing.B) {
			items := 0
			for b.Loop() {
				sc, err := w.store.Scan("", "")
				if err != nil {
					b.Fatal(err)
				}
				for {
					part, err := sc.Read()
					if err != nil {
						b.Fatal(err)
					}
					if len(part) == 0 {
						break
					}
					items += len(part)
					buf = buf[:0]
					for i := range part {
						if encode {
							buf = append(AppendItemJSON(buf, part[i].Key, part[i].Item, false), '\n')
						}
					}
				}
				sc.Close()
			}
			b.ReportMetric(float64(items)/b.Elapsed().Seconds(), "items/s")
		})
	}
}
