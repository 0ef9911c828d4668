package main

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

// TestVirtual_TTLStartsWhenApplied: a write that waits for a majority for longer
// than its TTL is there when it is answered, and for its TTL.
func TestVirtual_TTLStartsWhenApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		n := c.leader()
		c.waitLevel(store.LevelNewest)
		c.isolate(c.followers()...)
		time.Sleep(time.Second)
		time.AfterFunc(10*time.Second, func() { c.isolate() })
		if r := n.do(http.MethodPut, "/lock?ttl=2s&timeout=30s", "me"); r.status != http.StatusCreated || r.took < 9*time.Second {
			t.Fatal(r)
		}
		acked := time.Now()
		for n.do(http.MethodGet, "/lock", "").status == http.StatusOK && time.Since(acked) < 5*time.Second {
			time.Sleep(5 * time.Millisecond)
		}
		if lived := time.Since(acked); lived < 1900*time.Millisecond || lived > 2100*time.Millisecond {
			t.Errorf("ttl=2s: gone %v after the answer", lived)
		}
	})
}

// waitLevel waits until the cluster is at a feature level, which the test raises:
// its nodes cannot ask each other.
func (c *virtualCluster) waitLevel(level int) {
	c.t.Helper()
	raise := store.RaiseLevel(level, 1, 2, 3)
	for slices.ContainsFunc(c.nodes, func(n *virtualNode) bool { return n.loop.status.Load().level < level }) {
		if n := c.leader(); n != nil {
			_, err := n.loop.propose(c.t.Context(), time.Second, raise)
			testkit.Must(c.t, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestVirtual_ExpiryIsPunctual: a key goes at most 20 ms after its deadline, and
// many that are due at once follow each other.
func TestVirtual_ExpiryIsPunctual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newVirtualCluster(t)
		c.waitLevel(store.LevelNewest)
		n := c.leader()
		for i := range 20 {
			time.Sleep(time.Duration(i) * 7 * time.Millisecond)
			if r := n.do(http.MethodPut, "/k?ttl=1s", "v"); r.status != http.StatusCreated {
				t.Fatal(r)
			}
			it, _, _ := n.store.Get("k")
			for {
				if _, _, ok := n.store.Get("k"); !ok {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if late := time.Since(time.UnixMilli(it.Expires)); late < 0 || late > 20*time.Millisecond {
				t.Errorf("the key went %v after its deadline", late)
			}
		}

		const batches = 8
		at := time.Now().Add(2 * time.Second)
		for i := range batches {
			var x []store.Command
			for j := range expireMax {
				x = append(x, store.Command{Op: store.OpPut, Key: fmt.Sprintf("s/%d/%d", i, j), Expires: at.UnixMilli()})
			}
			b := newBatch(nil)
			for i := range x {
				b.add(&x[i])
			}
			b.deadline = at
			n.loop.mu.Lock()
			n.loop.push(b)
			n.loop.mu.Unlock()
			<-b.done
			testkit.Must(t, b.err)
		}
		time.Sleep(time.Until(at))
		for len(expiring(n.store)) > 0 {
			time.Sleep(time.Millisecond)
		}
		if late := time.Since(at); late > 20*time.Millisecond+batches*5*time.Millisecond {
			t.Errorf("%d keys that are due at once are gone after %v", batches*expireMax, late)
		}
	})
}

// expiring returns one of the keys that have a deadline, if there are any.
func expiring(s *store.Store) []store.Command { return s.Expired(1<<60, 1, 1) }
