package shares

import (
	"context"
	"net/netip"
	"sync"
)

// This file divides what a node has for all its clients: however much one address
// asks for, something is left for the others. Clients have no names yet, so an
// address stands for one. Those behind a proxy share one, like all on the same machine.

// Shares are places, or bytes, of which one address gets no more than its share.
type Shares struct {
	All, each int64

	Mu    sync.Mutex
	Taken int64
	by    map[netip.Addr]int64 // what each address has taken, if anything
	freed chan struct{}        // closed when something is given back; nil = nobody waits
}

func New(all, each int64) Shares {
	return Shares{All: all, each: each, by: map[netip.Addr]int64{}}
}

// MostOf is what one address gets of what there is little of: a quarter is for the others.
func MostOf(all int64) int64 { return all - all/4 }

// Take takes n for an address. If there is not enough it takes nothing.
func (s *Shares) Take(a netip.Addr, n int64) bool {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	return s.takeLocked(a, n)
}

func (s *Shares) takeLocked(a netip.Addr, n int64) bool {
	if s.Taken+n > s.All || s.by[a]+n > s.each {
		return false
	}
	s.Taken += n
	s.by[a] += n
	return true
}

// Await is take, but it waits for others to give until ctx ends.
func (s *Shares) Await(ctx context.Context, a netip.Addr, n int64) bool {
	for {
		s.Mu.Lock()
		if s.takeLocked(a, n) {
			s.Mu.Unlock()
			return true
		}
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		freed := s.freed
		s.Mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return false
		}
	}
}

// Give gives back what was taken.
func (s *Shares) Give(a netip.Addr, n int64) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	s.Taken -= n
	if s.by[a] -= n; s.by[a] == 0 {
		delete(s.by, a)
	}
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

// AddressOf returns the address of host:port as far as it tells clients apart. Of
// IPv6 that is the network: whoever has one address there has 2^64. What is no IP
// address is all the same.
func AddressOf(hostPort string) netip.Addr {
	ap, err := netip.ParseAddrPort(hostPort)
	if err != nil {
		return netip.Addr{}
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.Is6() && !a.IsLoopback() {
		p, _ := a.Prefix(64) // never fails with an IPv6 address
		return p.Addr()
	}
	return a
}
