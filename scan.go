package main

import (
	"errors"
	"slices"
	"strings"

	"github.com/tidwall/btree"
)

// This file reads many items as they were at one version while writes go on.
//
// A copy of the tree would do, but as long as a slow reader holds it, writes at
// random keys copy the tree a second time, leaf by leaf. A scan costs less: it
// reads the live tree in small parts, and whoever changes an item that it has
// yet to read leaves it the old one.

// Limits of scans.
const (
	scansMax     = 132
	scanPart     = 512      // items that are read without letting writes in
	scanKeptMin  = 64 << 20 // bytes of old items that all scans may keep, ...
	scanKeptPart = 2        // ... or the size of the store divided by this, if that is more
)

var (
	errScans    = errors.New("too many scans")
	errScanSlow = errors.New("the scan is too slow: too much has changed since it began")
)

// keyItem is an item and its key.
type keyItem struct {
	key string
	item
}

// scan is a position in the items with a prefix, as they were at version rv. Its
// methods are for one goroutine.
type scan struct {
	store *kvstore
	// items is the tree that was live when the scan began. A restore puts another
	// one in its place; then nobody writes to this one any more.
	items  *itemMap
	prefix string
	rv     uint64
	buf    []keyItem

	// Guarded by store.mu. Whoever applies writes to it holds the lock, the scan
	// itself only needs to read-lock.
	next    string                   // the first key that was not read
	ended   bool                     // there is none
	old     *btree.Map[string, item] // items from next on that have changed since rv, as they were
	oldSize uint64
	err     error
}

// scan starts to read the items with a prefix whose keys come after a key. The
// caller must close it.
func (s *kvstore) scan(prefix, after string) (*scan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.scanLocked(prefix, after)
}

func (s *kvstore) scanLocked(prefix, after string) (*scan, error) {
	if len(s.state.scans) >= scansMax {
		return nil, errScans
	}
	sc := &scan{
		store: s, items: s.state.items, prefix: prefix, rv: s.state.rv,
		next: firstKey(prefix, after), old: new(btree.Map[string, item]),
	}
	s.state.scans = append(s.state.scans, sc)
	return sc, nil
}

// firstKey is the first key with the prefix that can come after a key.
func firstKey(prefix, after string) string {
	if after == "" {
		return prefix
	}
	return max(prefix, after+"\x00")
}

// close ends the scan. Writes leave it nothing any more.
func (sc *scan) close() {
	sc.store.mu.Lock()
	defer sc.store.mu.Unlock()
	sc.store.state.endScan(sc)
}

func (s *state) endScan(sc *scan) {
	if i := slices.Index(s.scans, sc); i >= 0 {
		s.scans = slices.Delete(s.scans, i, i+1)
	}
}

// keep takes an item that is about to change or go.
func (sc *scan) keep(key string, it item, sizeMax uint64) {
	if sc.ended || sc.err != nil || it.rv > sc.rv || key < sc.next || !strings.HasPrefix(key, sc.prefix) {
		return
	}
	sc.old.Set(key, it)
	sc.oldSize += itemSize(key, it)
	if sc.oldSize > sizeMax {
		sc.err = errScanSlow
		sc.old = nil
	}
}

// keepForScans tells the scans of an item that is about to change or go.
func (s *state) keepForScans(key string, it item) {
	for _, sc := range s.scans {
		sc.keep(key, it, max(scanKeptMin, s.size/scanKeptPart)/uint64(len(s.scans)))
	}
}

// read returns the next items in key order, none at the end. What it returned
// before is overwritten.
func (sc *scan) read() ([]keyItem, error) {
	sc.buf = sc.buf[:0]
	for len(sc.buf) == 0 && !sc.ended {
		if err := sc.readPart(); err != nil {
			return nil, err
		}
	}
	return sc.buf, nil
}

// readPart appends some of the next items to buf. An item that has not changed
// is in the tree, with its version. One that has is in old; if the tree has the
// key too, then with a version above rv.
func (sc *scan) readPart() error {
	sc.store.mu.RLock()
	defer sc.store.mu.RUnlock()
	if sc.err != nil {
		return sc.err
	}
	last, seen, ended := "", 0, true
	sc.items.Ascend(sc.next, func(key string, it item) bool {
		if !strings.HasPrefix(key, sc.prefix) {
			return false
		}
		if seen == scanPart {
			ended = false
			return false
		}
		if it.rv <= sc.rv {
			sc.buf = append(sc.buf, keyItem{key, it})
		}
		last = key
		seen++
		return true
	})
	if last, ended = sc.mergeOld(last, ended); ended {
		sc.ended = true
		return nil
	}
	sc.next = last + "\x00"
	return nil
}

// mergeOld moves old items up to the key last, or all if the tree has ended,
// into buf. They may be too many; then the part ends sooner.
func (sc *scan) mergeOld(last string, ended bool) (string, bool) {
	n := 0
	for key, it, ok := sc.old.Min(); ok && (ended || key <= last); key, it, ok = sc.old.Min() {
		if n == scanPart {
			last, ended = sc.buf[len(sc.buf)-1].key, false
			break
		}
		sc.old.PopMin()
		sc.oldSize -= itemSize(key, it)
		sc.buf = append(sc.buf, keyItem{key, it})
		n++
	}
	if n == 0 {
		return last, ended
	}
	slices.SortFunc(sc.buf, func(a, b keyItem) int { return strings.Compare(a.key, b.key) })
	if !ended {
		end, found := slices.BinarySearchFunc(sc.buf, last, func(k keyItem, key string) int { return strings.Compare(k.key, key) })
		if found {
			end++
		}
		sc.buf = sc.buf[:end]
	}
	return last, ended
}

// list returns the first n items with a prefix whose keys come after a key, all
// from one moment. It lets no writes in meanwhile, so n must not be large.
func (s *kvstore) list(prefix, after string, n int) (items []keyItem, rv uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.state.items.Ascend(firstKey(prefix, after), func(key string, it item) bool {
		if len(items) == n || !strings.HasPrefix(key, prefix) {
			return false
		}
		items = append(items, keyItem{key, it})
		return true
	})
	return items, s.state.rv
}
