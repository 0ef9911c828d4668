package main

import (
	"syscall"
	"testing"
)

func TestListener_KeepAlive(t *testing.T) {
	l := newTestListener(t, listenerConfig{connectionsMax: 1})
	mustDialTCP(t, l)
	raw, err := mustAccept(t, l).(*conn).Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []struct {
		name              string
		level, code, want int
	}{
		{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
		{"TCP_KEEPINTVL", syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 5},
		{"TCP_KEEPCNT", syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, 4},
	} {
		var got int
		var getErr error
		if err := raw.Control(func(fd uintptr) { got, getErr = syscall.GetsockoptInt(int(fd), option.level, option.code) }); err != nil {
			t.Fatal(err)
		}
		if getErr != nil || got != option.want {
			t.Errorf("%s: %d, %v, want %d", option.name, got, getErr, option.want)
		}
	}
}
