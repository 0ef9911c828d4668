package shares

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func TestShares(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	s := New(10, 6)
	for i, step := range []struct {
		address netip.Addr
		n       int64
		want    bool
	}{
		{a, 7, false}, {a, 6, true}, {a, 1, false}, {b, 5, false}, {b, 4, true}, {b, 1, false}, {a, -6, true}, {b, 2, true}, {b, -6, true}, {a, 6, true}, {a, -6, true},
	} {
		ok := true
		if step.n < 0 {
			s.Give(step.address, -step.n)
		} else {
			ok = s.Take(step.address, step.n)
		}
		if ok != step.want {
			t.Fatalf("step %d: %v", i, ok)
		}
	}
	if s.Taken != 0 || len(s.by) != 0 {
		t.Errorf("left over: %d, %v", s.Taken, s.by)
	}
}

func TestShares_Await(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := netip.MustParseAddr("192.0.2.1")
		s := New(1, 1)
		took := make(chan bool)
		start := func(timeout time.Duration) {
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			go func() {
				defer cancel()
				took <- s.Await(ctx, a, 1)
			}()
		}
		start(time.Second)
		if !<-took {
			t.Fatal("there is one")
		}
		start(time.Second)
		if <-took {
			t.Fatal("there is none")
		}
		start(time.Minute)
		synctest.Wait()
		s.Give(a, 1)
		if !<-took {
			t.Error("it was given back")
		}
	})
}

func TestAddressOf(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "[::ffff:192.0.2.1]:80": "192.0.2.1", "[::1]:80": "::1", "[fe80::1%eth0]:80": "fe80::",
		"[2001:db8:1:2:3:4:5:6]:80": "2001:db8:1:2::", "pipe": "invalid IP", "": "invalid IP",
	} {
		if got := AddressOf(in).String(); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}
