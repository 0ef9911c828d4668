package main

import (
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/raft/v3/raftpb"

	"raftrv/internal/store"
)

// measuredDisk is the storage of a node with a clock beside it.
type measuredDisk struct {
	*storage
	vote, term uint64 // in the log; owned by the loop's goroutine

	saves         prometheus.Histogram
	snapshots     prometheus.Histogram
	snapshotBytes prometheus.Gauge
	snapshotIndex prometheus.Gauge
}

func newMeasuredDisk(s *storage) *measuredDisk {
	return &measuredDisk{
		storage: s,
		saves: newHistogram("fsync_duration_seconds", "Time to append entries to the log and make them durable.",
			prometheus.ExponentialBuckets(0.0001, 2, 16)),
		snapshots: newHistogram("snapshot_duration_seconds", "Time to write a snapshot, while writes go on.", prometheus.ExponentialBuckets(0.005, 2, 15)),
		snapshotBytes: prometheus.NewGauge(prometheus.GaugeOpts{Name: metricName("snapshot_bytes"),
			Help: "Bytes of the last snapshot that this process wrote; 0 if it wrote none yet."}),
		snapshotIndex: prometheus.NewGauge(prometheus.GaugeOpts{Name: metricName("snapshot_index"),
			Help: "Index of the last snapshot that this process wrote; 0 if it wrote none yet."}),
	}
}

func (d *measuredDisk) collectors() []prometheus.Collector {
	return []prometheus.Collector{d.saves, d.snapshots, d.snapshotBytes, d.snapshotIndex}
}

// save implements disk. A hard state in which only the commit index moved is
// not synced, and would make a slow disk look fast.
func (d *measuredDisk) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	start := time.Now()
	err := d.storage.save(hs, ents)
	synced := len(ents) > 0
	if hs.GetTerm() != 0 && (hs.GetTerm() != d.term || hs.GetVote() != d.vote) {
		d.term, d.vote, synced = hs.GetTerm(), hs.GetVote(), true
	}
	if synced {
		d.saves.Observe(time.Since(start).Seconds())
	}
	return err
}

// writeSnapshot implements disk.
func (d *measuredDisk) writeSnapshot(snap *raftpb.Snapshot, st *store.State) error {
	start := time.Now()
	if err := d.storage.writeSnapshot(snap, st); err != nil {
		return err
	}
	d.snapshots.Observe(time.Since(start).Seconds())
	index := snap.GetMetadata().GetIndex()
	if info, err := os.Stat(d.bodyPath(index)); err == nil {
		d.snapshotBytes.Set(float64(info.Size()))
		d.snapshotIndex.Set(float64(index))
	}
	return nil
}
