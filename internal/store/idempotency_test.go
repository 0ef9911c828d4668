package store

import (
	"fmt"
	"strings"
	"testing"
)

// checkRetries checks what always holds of a table.
func checkRetries(t *testing.T, r *retryTable) {
	t.Helper()
	if r.Records.Len() > retriesMax || r.Bytes > retryBytesMax || r.Records.Len() != r.Numbers.Len() {
		t.Fatalf("%d records, %d keys, %d bytes", r.Records.Len(), r.Numbers.Len(), r.Bytes)
	}
	var bytes uint64
	r.Records.Scan(func(n uint64, record RetryRecord) bool {
		bytes += record.size(r.rules)
		if number, _ := r.Numbers.Get(record.ID.Key); number != n || n >= r.next {
			t.Fatalf("record %d of %q is known as %d; the next one is %d", n, record.ID.Key, number, r.next)
		}
		return true
	})
	if bytes != r.Bytes {
		t.Fatalf("%d bytes, says %d", bytes, r.Bytes)
	}
}

func retryKey(i int) RetryID {
	return RetryID{Key: fmt.Sprint(i), Digest: [16]byte{byte(i), byte(i >> 8)}}
}

func TestRetries_Count(t *testing.T) {
	r := NewRetryTable()
	const n = retriesMax + 1000
	for i := range n {
		r.add(retryKey(i), Result{RV: uint64(i)}, 0)
	}
	checkRetries(t, &r)
	for i := range n {
		got, known := r.Lookup(retryKey(i), 0)
		if want := i >= n-retriesMax; known != want || known && (got.RV != uint64(i) || !got.Replayed) {
			t.Fatalf("request %d: %+v, %v", i, got, known)
		}
	}
}

func TestRetries_Bytes(t *testing.T) {
	r := NewRetryTable()
	value := strings.Repeat("v", 1<<20)
	const n = 100
	for i := range n {
		r.add(retryKey(i), Result{RV: uint64(i), Ops: []OpResult{{Item: Item{Value: value}}}}, 0)
		checkRetries(t, &r)
	}
	if left := r.Records.Len(); left < 60 || left > 64 {
		t.Errorf("%d records are left", left)
	}
	if _, known := r.Lookup(retryKey(n-1), 0); !known {
		t.Error("the newest is gone")
	}
}

func TestRetries_Age(t *testing.T) {
	r := NewRetryTable()
	r.add(retryKey(1), Result{RV: 1}, 1000)
	r.add(retryKey(2), Result{RV: 2}, 2000)
	for _, tt := range []struct {
		now          int64
		first, other bool
	}{
		{0, true, true}, // a clock that goes back
		{1000 + RetryAgeMillis, true, true},
		{1001 + RetryAgeMillis, false, true},
		{2001 + RetryAgeMillis, false, false},
	} {
		if _, known := r.Lookup(retryKey(1), tt.now); known != tt.first {
			t.Errorf("at %d: %v", tt.now, known)
		}
		if _, known := r.Lookup(retryKey(2), tt.now); known != tt.other {
			t.Errorf("at %d: %v", tt.now, known)
		}
	}
	// A key that is used again after its time starts anew, and the old record
	// makes room even though it was not the oldest.
	r.add(retryKey(2), Result{RV: 3}, 2001+RetryAgeMillis)
	checkRetries(t, &r)
	if got, known := r.Lookup(retryKey(2), 2001+RetryAgeMillis); !known || got.RV != 3 || r.Records.Len() != 1 {
		t.Errorf("%+v, %v, %d records", got, known, r.Records.Len())
	}
}

func TestRetries_OtherRequest(t *testing.T) {
	r := NewRetryTable()
	r.add(retryKey(1), Result{Status: StatusCreated, RV: 1, Key: "k"}, 0)
	other := retryKey(1)
	other.Digest[15]++
	if got, known := r.Lookup(other, 0); !known || got.Status != StatusRetryOther || got.Replayed || got.Key != "" {
		t.Errorf("%+v, %v", got, known)
	}
}

func TestRetries_CopyIsUndisturbed(t *testing.T) {
	r := NewRetryTable()
	for i := range 100 {
		r.add(retryKey(i), Result{RV: uint64(i)}, 0)
	}
	c := r.copy()
	r.add(retryKey(100), Result{}, 1+RetryAgeMillis) // and drops the others
	checkRetries(t, &r)
	checkRetries(t, &c)
	if r.Records.Len() != 1 || c.Records.Len() != 100 {
		t.Errorf("%d and %d records", r.Records.Len(), c.Records.Len())
	}
}

// TestRetries_Size: how records are counted decides which are forgotten, so every member must count alike.
func TestRetries_Size(t *testing.T) {
	r := RetryRecord{ID: RetryID{Key: "retry"}, First: Result{Key: "of", Ops: []OpResult{{Item: Item{Value: "value"}}, {}}}}
	if got, want := r.size(&rulesOf[2]), uint64(256+5+2+64+5+64); got != want {
		t.Errorf("%d bytes, want %d", got, want)
	}
}

// TestRetries_Bounds: what is just at a bound stays, what is over it goes.
func TestRetries_Bounds(t *testing.T) {
	r := NewRetryTable()
	r.add(retryKey(1), Result{}, 1000)
	r.add(retryKey(2), Result{}, 1000+RetryAgeMillis)
	if n := r.Records.Len(); n != 2 {
		t.Errorf("age: %d records, want 2", n)
	}
	r.add(retryKey(3), Result{}, 1001+RetryAgeMillis)
	if _, there := r.Numbers.Get(retryKey(1).Key); there || r.Records.Len() != 2 {
		t.Errorf("age: %d records, the oldest is there: %v", r.Records.Len(), there)
	}

	r = NewRetryTable()
	overhead := RetryRecord{ID: retryKey(1), First: Result{Ops: make([]OpResult, 1)}}
	half := Result{Ops: []OpResult{{Item: Item{Value: strings.Repeat("v", retryBytesMax/2-int(overhead.size(r.rules)))}}}}
	r.add(retryKey(1), half, 0)
	r.add(retryKey(2), half, 0)
	if r.Bytes != retryBytesMax || r.Records.Len() != 2 {
		t.Errorf("%d bytes in %d records, want %d in 2", r.Bytes, r.Records.Len(), retryBytesMax)
	}
	r.add(retryKey(3), Result{}, 0)
	if n := r.Records.Len(); n != 2 {
		t.Errorf("bytes: %d records, want 2", n)
	}
}

// TestRetries_Shares: whoever fills the table loses its own, as long as others have less of it.
func TestRetries_Shares(t *testing.T) {
	from := func(client uint64, i int) RetryID {
		id := retryKey(i)
		id.Key, id.Client = fmt.Sprint(client, "-", i), client
		return id
	}
	known := func(r *retryTable, client uint64, n int) (count int) {
		for i := range n {
			if _, ok := r.Lookup(from(client, i), 0); ok {
				count++
			}
		}
		return count
	}
	r := NewRetryTable()
	r.rules = &rulesOf[3]
	const few = 1000
	for i := range few {
		r.add(from(1, i), Result{}, 0)
	}
	for i := range 70_000 {
		r.add(from(2, i), Result{}, 0)
	}
	checkRetries(t, &r)
	if n := known(&r, 1, few); n != few || r.Records.Len() != retriesMax {
		t.Errorf("of one with few requests %d of %d are remembered, of all %d", n, few, r.Records.Len())
	}
	if n := known(&r, 2, 70_000); n != retriesMax-few {
		t.Errorf("of the other %d are remembered", n)
	}
	// Three share it, whatever each of theirs takes, and the large go first.
	large := Result{Key: strings.Repeat("k", 4096)}
	for i := range 30_000 {
		r.add(from(3, i), large, 0)
	}
	checkRetries(t, &r)
	share2, _ := r.shares.Get(2)
	share3, _ := r.shares.Get(3)
	if n := known(&r, 1, few); n != few || max(share2, share3)-min(share2, share3) > 16<<10 || r.Bytes < retryBytesMax-16<<10 {
		t.Errorf("of the first %d are left, the others have %d and %d bytes of %d", n, share2, share3, r.Bytes)
	}
	// All of it is made from the records.
	again := NewRetryTable()
	again.rules = r.rules
	r.Records.Scan(func(n uint64, record RetryRecord) bool {
		again.insert(n, record)
		return true
	})
	if again.Bytes != r.Bytes || again.Digest != r.Digest || again.oldestOfHeaviest() != r.oldestOfHeaviest() {
		t.Errorf("%d bytes, made again %d", r.Bytes, again.Bytes)
	}
	// An hour later the shares are gone with the records.
	r.add(from(4, 0), Result{}, 1+RetryAgeMillis)
	checkRetries(t, &r)
	if r.Records.Len() != 1 || r.shares.Len() != 1 || r.heaviest.Len() != 1 || r.ofClients.Len() != 1 {
		t.Errorf("%d records, %d shares, %d, %d", r.Records.Len(), r.shares.Len(), r.heaviest.Len(), r.ofClients.Len())
	}
}
