package store

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
	ScansMax     = 132
	ScanPart     = 512      // items that are read without letting writes in
	scanKeptMin  = 64 << 20 // bytes of old items that all scans may keep, ...
	scanKeptPart = 2        // ... or the size of the store divided by this, if that is more
)

var (
	errScans    = errors.New("too many scans")
	errScanSlow = errors.New("the scan is too slow: too much has changed since it began")
)

// KeyItem is an item and its key.
type KeyItem struct {
	Key string
	Item
}

// Scan is a position in the items with a prefix, as they were at version rv. Its
// methods are for one goroutine.
type Scan struct {
	store *Store
	// items is the tree that was live when the scan began. A restore puts another
	// one in its place; then nobody writes to this one any more.
	items  *itemMap
	prefix string
	RV     uint64
	buf    []KeyItem

	// Guarded by store.mu. Whoever applies writes to it holds the lock, the scan
	// itself only needs to read-lock.
	next    string                   // the first key that was not read
	ended   bool                     // there is none
	old     *btree.Map[string, Item] // items from next on that have changed since rv, as they were
	oldSize uint64
	err     error
}

// Scan starts to read the items with a prefix whose keys come after a key. The
// caller must close it.
func (s *Store) Scan(prefix, after string) (*Scan, error) {
	s.Mu.Lock()
	defer s.Mu.Unlock()
	return s.scanLocked(prefix, after)
}

func (s *Store) scanLocked(prefix, after string) (*Scan, error) {
	if len(s.State.Scans) >= ScansMax {
		return nil, errScans
	}
	sc := &Scan{
		store: s, items: s.State.Items, prefix: prefix, RV: s.State.RV,
		next: firstKey(prefix, after), old: new(btree.Map[string, Item]),
	}
	s.State.Scans = append(s.State.Scans, sc)
	return sc, nil
}

// firstKey is the first key with the prefix that can come after a key.
func firstKey(prefix, after string) string {
	if after == "" {
		return prefix
	}
	return max(prefix, after+"\x00")
}

// Close ends the scan. Writes leave it nothing any more.
func (sc *Scan) Close() {
	sc.store.Mu.Lock()
	defer sc.store.Mu.Unlock()
	sc.store.State.endScan(sc)
}

func (s *State) endScan(sc *Scan) {
	if i := slices.Index(s.Scans, sc); i >= 0 {
		s.Scans = slices.Delete(s.Scans, i, i+1)
	}
}

// keep takes an item that is about to change or go.
func (sc *Scan) keep(key string, it Item, sizeMax uint64) {
	if sc.ended || sc.err != nil || it.RV > sc.RV || key < sc.next || !strings.HasPrefix(key, sc.prefix) {
		return
	}
	sc.old.Set(key, it)
	sc.oldSize += ItemSize(key, it)
	if sc.oldSize > sizeMax {
		sc.err = errScanSlow
		sc.old = nil
	}
}

// keepForScans tells the scans of an item that is about to change or go.
func (s *State) keepForScans(key string, it Item) {
	for _, sc := range s.Scans {
		sc.keep(key, it, max(scanKeptMin, s.size/scanKeptPart)/uint64(len(s.Scans)))
	}
}

// Read returns the next items in key order, none at the end. What it returned
// before is overwritten.
func (sc *Scan) Read() ([]KeyItem, error) {
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
func (sc *Scan) readPart() error {
	sc.store.Mu.RLock()
	defer sc.store.Mu.RUnlock()
	if sc.err != nil {
		return sc.err
	}
	last, seen, ended := "", 0, true
	sc.items.Ascend(sc.next, func(key string, it Item) bool {
		if !strings.HasPrefix(key, sc.prefix) {
			return false
		}
		if seen == ScanPart {
			ended = false
			return false
		}
		if it.RV <= sc.RV {
			sc.buf = append(sc.buf, KeyItem{key, it})
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
func (sc *Scan) mergeOld(last string, ended bool) (string, bool) {
	n := 0
	for key, it, ok := sc.old.Min(); ok && (ended || key <= last); key, it, ok = sc.old.Min() {
		if n == ScanPart {
			last, ended = sc.buf[len(sc.buf)-1].Key, false
			break
		}
		sc.old.PopMin()
		sc.oldSize -= ItemSize(key, it)
		sc.buf = append(sc.buf, KeyItem{key, it})
		n++
	}
	if n == 0 {
		return last, ended
	}
	slices.SortFunc(sc.buf, func(a, b KeyItem) int { return strings.Compare(a.Key, b.Key) })
	if !ended {
		end, found := slices.BinarySearchFunc(sc.buf, last, func(k KeyItem, key string) int { return strings.Compare(k.Key, key) })
		if found {
			end++
		}
		sc.buf = sc.buf[:end]
	}
	return last, ended
}

// List returns the first n items with a prefix whose keys come after a key, all
// from one moment. It lets no writes in meanwhile, so n must not be large.
func (s *Store) List(prefix, after string, n int) (items []KeyItem, rv uint64) {
	s.Mu.RLock()
	defer s.Mu.RUnlock()
	s.State.Items.Ascend(firstKey(prefix, after), func(key string, it Item) bool {
		if len(items) == n || !strings.HasPrefix(key, prefix) {
			return false
		}
		items = append(items, KeyItem{key, it})
		return true
	})
	return items, s.State.RV
}
