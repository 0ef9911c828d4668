package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// This file keeps the heap of a large store from growing to twice its size.

// garbageFree is how much garbage is worth keeping to collect less often,
// however little is alive.
const garbageFree = 256 << 20 // bytes

// boundGarbage makes the collector run when there is half as much garbage as
// there is alive, instead of as much, if the heap is large. The share is set anew
// after each collection. Who sets GOGC knows better.
func boundGarbage() {
	if os.Getenv("GOGC") != "" {
		return
	}
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	var collected func(int)
	collected = func(int) {
		metrics.Read(sample)
		debug.SetGCPercent(gcPercent(sample[0].Value.Uint64()))
		runtime.AddCleanup(new([16]byte), collected, 0) // runs after the next collection
	}
	collected(0)
}

// gcPercent returns the value of GOGC for so many bytes that are alive.
func gcPercent(live uint64) int {
	if live <= garbageFree {
		return 100
	}
	return int(100 * max(garbageFree, live/2) / live)
}
