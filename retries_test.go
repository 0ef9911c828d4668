package main

import (
	"fmt"
	"strings"
	"testing"
)

// checkRetries checks what always holds of a table.
func checkRetries(t *testing.T, r *retryTable) {
	t.Helper()
	if r.records.Len() > retriesMax || r.bytes > retryBytesMax || r.records.Len() != r.numbers.Len() {
		t.Fatalf("%d records, %d keys, %d bytes", r.records.Len(), r.numbers.Len(), r.bytes)
	}
	var bytes uint64
	r.records.Scan(func(n uint64, record retryRecord) bool {
		bytes += record.size(r.rules)
		if number, _ := r.numbers.Get(record.id.key); number != n || n >= r.next {
			t.Fatalf("record %d of %q is known as %d; the next one is %d", n, record.id.key, number, r.next)
		}
		return true
	})
	if bytes != r.bytes {
		t.Fatalf("%d bytes, says %d", bytes, r.bytes)
	}
}

func retryKey(i int) retryID {
	return retryID{key: fmt.Sprint(i), digest: [16]byte{byte(i), byte(i >> 8)}}
}

func TestRetries_Count(t *testing.T) {
	r := newRetryTable()
	const n = retriesMax + 1000
	for i := range n {
		r.add(retryKey(i), result{rv: uint64(i)}, 0)
	}
	checkRetries(t, &r)
	for i := range n {
		got, known := r.lookup(retryKey(i), 0)
		if want := i >= n-retriesMax; known != want || known && (got.rv != uint64(i) || !got.replayed) {
			t.Fatalf("request %d: %+v, %v", i, got, known)
		}
	}
}

func TestRetries_Bytes(t *testing.T) {
	r := newRetryTable()
	value := strings.Repeat("v", 1<<20)
	const n = 100
	for i := range n {
		r.add(retryKey(i), result{rv: uint64(i), ops: []opResult{{item: item{value: value}}}}, 0)
		checkRetries(t, &r)
	}
	if left := r.records.Len(); left < 60 || left > 64 {
		t.Errorf("%d records are left", left)
	}
	if _, known := r.lookup(retryKey(n-1), 0); !known {
		t.Error("the newest is gone")
	}
}

func TestRetries_Age(t *testing.T) {
	r := newRetryTable()
	r.add(retryKey(1), result{rv: 1}, 1000)
	r.add(retryKey(2), result{rv: 2}, 2000)
	for _, tt := range []struct {
		now          int64
		first, other bool
	}{
		{0, true, true}, // a clock that goes back
		{1000 + retryAgeMillis, true, true},
		{1001 + retryAgeMillis, false, true},
		{2001 + retryAgeMillis, false, false},
	} {
		if _, known := r.lookup(retryKey(1), tt.now); known != tt.first {
			t.Errorf("at %d: %v", tt.now, known)
		}
		if _, known := r.lookup(retryKey(2), tt.now); known != tt.other {
			t.Errorf("at %d: %v", tt.now, known)
		}
	}
	// A key that is used again after its time starts anew, and the old record
	// makes room even though it was not the oldest.
	r.add(retryKey(2), result{rv: 3}, 2001+retryAgeMillis)
	checkRetries(t, &r)
	if got, known := r.lookup(retryKey(2), 2001+retryAgeMillis); !known || got.rv != 3 || r.records.Len() != 1 {
		t.Errorf("%+v, %v, %d records", got, known, r.records.Len())
	}
}

func TestRetries_OtherRequest(t *testing.T) {
	r := newRetryTable()
	r.add(retryKey(1), result{status: statusCreated, rv: 1, key: "k"}, 0)
	other := retryKey(1)
	other.digest[15]++
	if got, known := r.lookup(other, 0); !known || got.status != statusRetryOther || got.replayed || got.key != "" {
		t.Errorf("%+v, %v", got, known)
	}
}

func TestRetries_CopyIsUndisturbed(t *testing.T) {
	r := newRetryTable()
	for i := range 100 {
		r.add(retryKey(i), result{rv: uint64(i)}, 0)
	}
	c := r.copy()
	r.add(retryKey(100), result{}, 1+retryAgeMillis) // and drops the others
	checkRetries(t, &r)
	checkRetries(t, &c)
	if r.records.Len() != 1 || c.records.Len() != 100 {
		t.Errorf("%d and %d records", r.records.Len(), c.records.Len())
	}
}

// TestRetries_Size: how records are counted decides which are forgotten, so every member must count alike.
func TestRetries_Size(t *testing.T) {
	r := retryRecord{id: retryID{key: "retry"}, first: result{key: "of", ops: []opResult{{item: item{value: "value"}}, {}}}}
	if got, want := r.size(&rulesOf[2]), uint64(256+5+2+64+5+64); got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
}

// TestRetries_Bounds: what is just at a bound stays, what is over it goes.
func TestRetries_Bounds(t *testing.T) {
	r := newRetryTable()
	r.add(retryKey(1), result{}, 1000)
	r.add(retryKey(2), result{}, 1000+retryAgeMillis)
	if n := r.records.Len(); n != 2 {
		t.Errorf("age: %d records, want 2", n)
	}
	r.add(retryKey(3), result{}, 1001+retryAgeMillis)
	if _, there := r.numbers.Get(retryKey(1).key); there || r.records.Len() != 2 {
		t.Errorf("age: %d records, the oldest is there: %v", r.records.Len(), there)
	}

	r = newRetryTable()
	overhead := retryRecord{id: retryKey(1), first: result{ops: make([]opResult, 1)}}
	half := result{ops: []opResult{{item: item{value: strings.Repeat("v", retryBytesMax/2-int(overhead.size(r.rules)))}}}}
	r.add(retryKey(1), half, 0)
	r.add(retryKey(2), half, 0)
	if r.bytes != retryBytesMax || r.records.Len() != 2 {
		t.Errorf("%d bytes in %d records, want %d in 2", r.bytes, r.records.Len(), retryBytesMax)
	}
	r.add(retryKey(3), result{}, 0)
	if n := r.records.Len(); n != 2 {
		t.Errorf("bytes: %d records, want 2", n)
	}
}

// TestRetries_Shares: whoever fills the table loses its own, as long as others have less of it.
func TestRetries_Shares(t *testing.T) {
	from := func(client uint64, i int) retryID {
		id := retryKey(i)
		id.key, id.client = fmt.Sprint(client, "-", i), client
		return id
	}
	known := func(r *retryTable, client uint64, n int) (count int) {
		for i := range n {
			if _, ok := r.lookup(from(client, i), 0); ok {
				count++
			}
		}
		return count
	}
	r := newRetryTable()
	r.rules = &rulesOf[3]
	const few = 1000
	for i := range few {
		r.add(from(1, i), result{}, 0)
	}
	for i := range 70_000 {
		r.add(from(2, i), result{}, 0)
	}
	checkRetries(t, &r)
	if n := known(&r, 1, few); n != few || r.records.Len() != retriesMax {
		t.Errorf("of one with few requests %d of %d are remembered, of all %d", n, few, r.records.Len())
	}
	if n := known(&r, 2, 70_000); n != retriesMax-few {
		t.Errorf("of the other %d are remembered", n)
	}
	// Three share it, whatever each of theirs takes, and the large go first.
	large := result{key: strings.Repeat("k", 4096)}
	for i := range 30_000 {
		r.add(from(3, i), large, 0)
	}
	checkRetries(t, &r)
	share2, _ := r.shares.Get(2)
	share3, _ := r.shares.Get(3)
	if n := known(&r, 1, few); n != few || max(share2, share3)-min(share2, share3) > 16<<10 || r.bytes < retryBytesMax-16<<10 {
		t.Errorf("of the first %d are left, the others have %d and %d bytes of %d", n, share2, share3, r.bytes)
	}
	// All of it is made from the records.
	again := newRetryTable()
	again.rules = r.rules
	r.records.Scan(func(n uint64, record retryRecord) bool {
		again.insert(n, record)
		return true
	})
	if again.bytes != r.bytes || again.digest != r.digest || again.oldestOfHeaviest() != r.oldestOfHeaviest() {
		t.Errorf("%d bytes, made again %d", r.bytes, again.bytes)
	}
	// An hour later the shares are gone with the records.
	r.add(from(4, 0), result{}, 1+retryAgeMillis)
	checkRetries(t, &r)
	if r.records.Len() != 1 || r.shares.Len() != 1 || r.heaviest.Len() != 1 || r.ofClients.Len() != 1 {
		t.Errorf("%d records, %d shares, %d, %d", r.records.Len(), r.shares.Len(), r.heaviest.Len(), r.ofClients.Len())
	}
}
