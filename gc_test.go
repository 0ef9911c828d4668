package main

import "testing"

func TestGCPercent(t *testing.T) {
	for _, tt := range []struct {
		live uint64
		want int
	}{
		{0, 100},
		{1 << 20, 100},
		{256 << 20, 100},
		{320 << 20, 80}, // as much garbage as before, not less
		{512 << 20, 50},
		{4 << 30, 50},
	} {
		if got := gcPercent(tt.live); got != tt.want {
			t.Errorf("with %d bytes alive: %d, want %d", tt.live, got, tt.want)
		}
	}
}
