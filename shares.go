package main

import (
	"context"
	"net/netip"
	"sync"
)

// This file divides what a node has for all its clients: however much one address
// asks for, something is left for the others. Clients have no names yet, so an
// address stands for one. Those behind a proxy share one, like all on the same machine.

// shares are places, or bytes, of which one address gets no more than its share.
type shares struct {
	all, each int64

	mu    sync.Mutex
	taken int64
	by    map[netip.Addr]int64 // what each address has taken, if anything
	freed chan struct{}        // closed when something is given back; nil = nobody waits
}

func newShares(all, each int64) shares {
	return shares{all: all, each: each, by: map[netip.Addr]int64{}}
}

// mostOf is what one address gets of what there is little of: a quarter is for the others.
func mostOf(all int64) int64 { return all - all/4 }

// take takes n for an address. If there is not enough it takes nothing.
func (s *shares) take(a netip.Addr, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.takeLocked(a, n)
}

func (s *shares) takeLocked(a netip.Addr, n int64) bool {
	if s.taken+n > s.all || s.by[a]+n > s.each {
		return false
	}
	s.taken += n
	s.by[a] += n
	return true
}

// await is take, but it waits for others to give until ctx ends.
func (s *shares) await(ctx context.Context, a netip.Addr, n int64) bool {
	for {
		s.mu.Lock()
		if s.takeLocked(a, n) {
			s.mu.Unlock()
			return true
		}
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		freed := s.freed
		s.mu.Unlock()
		select {
		case <-freed:
		case <-ctx.Done():
			return false
		}
	}
}

// give gives back what was taken.
func (s *shares) give(a netip.Addr, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken -= n
	if s.by[a] -= n; s.by[a] == 0 {
		delete(s.by, a)
	}
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

// addressOf returns the address of host:port as far as it tells clients apart. Of
// IPv6 that is the network: whoever has one address there has 2^64. What is no IP
// address is all the same.
func addressOf(hostPort string) netip.Addr {
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
