package httpapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
	"raftrv/internal/testkit"
)

var itemTests = []struct {
	key  string
	it   store.Item
	want string
}{
	{"a", store.Item{Value: "1", RV: 7, Created: 3}, `{"key":"a","value":"1","resourceVersion":7,"createdResourceVersion":3}`},
	{"a", store.Item{RV: 1, Created: 1, Expires: 1767366245678}, `{"key":"a","value":"","resourceVersion":1,"createdResourceVersion":1,"expiresAt":"2026-01-02T15:04:05.678Z"}`},
	{"\xff", store.Item{Value: "\x80\x00", RV: 1, Created: 1}, `{"keyBase64":"/w==","valueBase64":"gAA=","resourceVersion":1,"createdResourceVersion":1}`},
	{"é\"\\/", store.Item{Value: "\x00\x1f\n\r\t\x7f<>&\u2028", RV: 1<<64 - 1, Created: 1}, `{"key":"é\"\\/","value":"\u0000\u001f\n\r\t` + "\x7f<>&\u2028" + `","resourceVersion":18446744073709551615,"createdResourceVersion":1}`},
}

func TestItemJSON(t *testing.T) {
	for _, tt := range itemTests {
		if got := string(store.AppendItemJSON(nil, tt.key, tt.it, false)); got != tt.want {
			t.Errorf("%s\nwant\n%s", got, tt.want)
		}
	}
	got := string(store.AppendItemJSON([]byte("x"), "a", store.Item{Value: "1", RV: 2, Created: 1}, true))
	if want := `x{"key":"a","resourceVersion":2,"createdResourceVersion":1}`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// Every key and value comes back from JSON as it was, on one line, for anybody's
// decoder.
func FuzzItemJSON(f *testing.F) {
	for _, tt := range itemTests {
		f.Add(tt.key, tt.it.Value, tt.it.RV, tt.it.Expires)
	}
	f.Fuzz(func(t *testing.T, key, value string, rv uint64, expires int64) {
		expires &= 1<<47 - 1 // RFC 3339 has years of four digits
		b := store.AppendItemJSON(nil, key, store.Item{Value: value, RV: rv, Created: rv / 2, Expires: expires}, false)
		var got testkit.JSONItem
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.DisallowUnknownFields()
		if err := d.Decode(&got); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		if got.RawKey() != key || got.RawValue() != value || got.ResourceVersion != rv || got.CreatedResourceVersion != rv/2 {
			t.Fatalf("%q", b)
		}
		if (got.Key != nil) != utf8.ValidString(key) || (got.Value != nil) != utf8.ValidString(value) {
			t.Fatalf("%q", b)
		}
		if got.ExpiresAt == nil != (expires == 0) || expires != 0 && got.ExpiresAt.UnixMilli() != expires {
			t.Fatalf("%q, want %d", b, expires)
		}
		for _, c := range b {
			if c < ' ' {
				t.Fatalf("%q", b)
			}
		}
	})
}

func BenchmarkItemJSON(b *testing.B) {
	for _, size := range []int{64, 1024} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			var buf []byte
			it := store.Item{Value: strings.Repeat("v", size), RV: 123456, Created: 123}
			b.SetBytes(int64(size))
			for b.Loop() {
				buf = store.AppendItemJSON(buf[:0], "some/key-123456", it, false)
			}
		})
	}
}

func TestHTTP_GetItem(t *testing.T) {
	f := newFront(t)
	for i, key := range []string{"a", "1", "a/b//c", "a/", "/", "..", "../keys", "", "-", "-/v1/txn", "\x00\xff", "é", "%", "?a=b", " ", strings.Repeat("\xff", store.KeySizeMax)} {
		target := "/-/v1/keys/" + KeyPath(key)[1:]
		if key == "" {
			f.do("GET", target, "").Want(t, 404)
			continue
		}
		value := strconv.Itoa(i) + "\xff"[:i%2]
		f.put(key, value)
		a := f.do("GET", target, "")
		it := testkit.MustDecode[testkit.JSONItem](t, a)
		rv := f.store.Version()
		if it.RawKey() != key || it.RawValue() != value || it.ResourceVersion != rv {
			t.Errorf("GET %s: %s", target, a.Body)
		}
		a.WantHeader(t, "ETag", fmt.Sprintf("%q", fmt.Sprint(rv)))
		a.WantHeader(t, "Resource-Version", fmt.Sprint(rv))
		a.WantHeader(t, "Content-Type", "application/json")
		f.do("GET", target, "", "If-None-Match: "+a.Header.Get("ETag")).Want(t, 304)
		f.do("GET", target, "", `If-Match: "0"`).Want(t, 412)
		if b := f.do("HEAD", target, ""); b.Code != 200 || b.Body != "" || b.Header.Get("Content-Length") != fmt.Sprint(len(a.Body)) {
			t.Errorf("HEAD %s: %+v", target, b)
		}
	}
	a := f.do("GET", "/-/v1/keys/none", "")
	a.Want(t, 404)
	if p := mustProblem(t, a); p.Code != "not-found" {
		t.Errorf("%+v", p)
	}
	f.do("GET", "/-/v1/keys/a%zz", "").Want(t, 400)
	f.do("GET", "/-/v1/keys/"+strings.Repeat("a", store.KeySizeMax+1), "").Want(t, 400)
	// A key of many slashes, unescaped.
	if it := testkit.MustDecode[testkit.JSONItem](t, f.do("GET", "/-/v1/keys/a/b//c", "")); it.RawKey() != "a/b//c" {
		t.Error(it.RawKey())
	}
}

func TestHTTP_List(t *testing.T) {
	f := newFront(t)
	all := []string{"a", "a/1", "a/2", "a/3", "a0", "b\xff", "b\xff\xff", "é"}
	for _, key := range all {
		f.put(key, "value of "+key)
	}
	for _, tt := range []struct {
		query string
		want  []string
		after string
	}{
		{"", all, ""},
		{"?limit=8", all, ""},
		{"?limit=3", all[:3], "a/2"},
		{"?limit=3&after=a%2F2", all[3:6], "b\xff"},
		{"?limit=3&after=b%FF", all[6:], ""},
		{"?limit=7", all[:7], "b\xff\xff"},
		{"?after=a", all[1:], ""},
		{"?after=a/", all[1:], ""},
		{"?after=" + all[7], nil, ""},
		{"?prefix=a/", all[1:4], ""},
		{"?prefix=a%2F&limit=1", all[1:2], "a/1"},
		{"?prefix=a/&after=a/1", all[2:4], ""},
		{"?prefix=a/&after=A", all[1:4], ""},
		{"?prefix=a/&after=b", nil, ""},
		{"?prefix=b%FF", all[5:7], ""},
		{"?prefix=b%FF%FF", all[6:7], ""},
		{"?prefix=c", nil, ""},
		{"?prefix=" + strings.Repeat("c", 2*store.KeySizeMax), nil, ""},
	} {
		for _, keysOnly := range []bool{false, true} {
			target := "/-/v1/keys" + tt.query
			if keysOnly {
				target += map[bool]string{true: "?", false: "&"}[tt.query == ""] + "keysOnly=true"
			}
			a := f.do("GET", target, "")
			list := testkit.MustDecode[testkit.JSONList](t, a)
			wantItems(t, target, list.Items, tt.want, keysOnly)
			if got := testkit.TextOrBytes(list.After, list.AfterBase64); got != tt.after || (list.After != nil || list.AfterBase64 != nil) != (tt.after != "") {
				t.Errorf("%s: after %q, want %q", target, got, tt.after)
			}
			if list.ResourceVersion != 8 || !strings.Contains(a.Body, `"items":[`) {
				t.Errorf("%s: %s", target, a.Body)
			}
			a.WantHeader(t, "Resource-Version", "8")
			a.WantHeader(t, "Content-Type", "application/json")
			a.WantHeader(t, "Vary", "Accept")
			a.WantHeader(t, "X-Content-Type-Options", "nosniff")
			a.WantHeader(t, "Content-Length", fmt.Sprint(len(a.Body)))

			stream := f.do("GET", target, "", "Accept: text/html;q=0.5, Application/X-NDJSON;q=0.9")
			stream.Want(t, 200)
			stream.WantHeader(t, "Resource-Version", "8")
			stream.WantHeader(t, "Content-Type", "application/x-ndjson")
			stream.WantHeader(t, "Vary", "Accept")
			stream.WantHeader(t, "X-Content-Type-Options", "nosniff")
			wantItems(t, target, decodeLines(t, stream.Body), tt.want, keysOnly)
			if strings.Count(stream.Body, "\n") != len(tt.want)+1 {
				t.Errorf("%s: %q", target, stream.Body)
			}
		}
	}
	for _, accept := range []string{"application/json", "application/x-ndjson"} {
		a := f.do("HEAD", "/-/v1/keys", "", "Accept: "+accept)
		a.Want(t, 200)
		a.WantHeader(t, "Content-Type", accept)
		a.WantHeader(t, "Resource-Version", "8")
		if a.Body != "" {
			t.Errorf("%q", a.Body)
		}
	}
}

func wantItems(t *testing.T, target string, items []testkit.JSONItem, want []string, keysOnly bool) {
	t.Helper()
	if len(items) != len(want) {
		t.Errorf("%s: %d items, want %d", target, len(items), len(want))
		return
	}
	for i, it := range items {
		value := "value of " + want[i]
		if keysOnly {
			value = ""
		}
		if it.RawKey() != want[i] || it.RawValue() != value || it.ResourceVersion == 0 {
			t.Errorf("%s: item %d is %+v, want %q", target, i, it, want[i])
		}
	}
}

func decodeLines(t *testing.T, body string) []testkit.JSONItem {
	t.Helper()
	items, end, err := readStream(body)
	if err != nil {
		t.Fatal(err)
	}
	if end.Count != len(items) {
		t.Errorf("%d items, and the end says %d", len(items), end.Count)
	}
	return items
}

// streamEnd is the last line of a stream of items.
type streamEnd struct {
	Count           int
	ResourceVersion uint64
	After           *string
	AfterBase64     []byte
}

// readStream fails if a stream is not whole.
func readStream(body string) (items []testkit.JSONItem, end streamEnd, err error) {
	ended := false
	for line := range strings.Lines(body) {
		var it struct {
			testkit.JSONItem
			Count *int
		}
		if err := json.Unmarshal([]byte(line), &it); err != nil || ended || !strings.HasSuffix(line, "\n") {
			return items, end, fmt.Errorf("%.100q: %v, after the end: %v", line, err, ended)
		}
		if ended = it.Count != nil; ended {
			if err := json.Unmarshal([]byte(line), &end); err != nil {
				return items, end, err
			}
		} else {
			items = append(items, it.JSONItem)
		}
	}
	if !ended {
		return items, end, io.ErrUnexpectedEOF
	}
	return items, end, nil
}

// A list that does not fit into one buffer comes whole, with and without pages.
func TestHTTP_LongList(t *testing.T) {
	f := newFront(t)
	const n = 25_000
	var keys []string
	for i := range n {
		keys = append(keys, fmt.Sprintf("key-%05d", i))
		f.put(keys[i], "value of "+keys[i])
	}
	stream := f.do("GET", "/-/v1/keys", "", "Accept: application/x-ndjson")
	wantItems(t, "stream", decodeLines(t, stream.Body), keys, false)
	stream.WantHeader(t, "Transfer-Encoding", "") // net/http has decoded it
	stream.WantHeader(t, "Content-Length", "")
	for _, accept := range []string{"application/json", "application/x-ndjson"} {
		a := f.do("HEAD", "/-/v1/keys?limit=10000", "", "Accept: "+accept)
		a.Want(t, 200)
		a.WantHeader(t, "Content-Length", "") // which nobody knows yet
	}
	// A response of one part has a length, although it is more than net/http would count.
	a := f.do("GET", "/-/v1/keys?limit=100", "")
	if len(a.Body) < 4<<10 {
		t.Errorf("%d bytes are too few to tell", len(a.Body))
	}
	a.WantHeader(t, "Content-Length", fmt.Sprint(len(a.Body)))
	limited := f.do("GET", "/-/v1/keys?limit=20001", "", "Accept: application/x-ndjson")
	wantItems(t, "limited stream", decodeLines(t, limited.Body), keys[:20_001], false)
	if _, end, _ := readStream(limited.Body); end.After == nil || *end.After != keys[20_000] || end.ResourceVersion != n {
		t.Errorf("%+v", end)
	}
	if _, end, _ := readStream(stream.Body); end.After != nil {
		t.Errorf("%+v", end)
	}

	var got []testkit.JSONItem
	pages := 0
	for after := ""; ; pages++ {
		list := testkit.MustDecode[testkit.JSONList](t, f.do("GET", "/-/v1/keys?limit=10000&after="+after, ""))
		got = append(got, list.Items...)
		if list.After == nil {
			break
		}
		after = *list.After
	}
	wantItems(t, "pages", got, keys, false)
	if pages != 2 {
		t.Errorf("%d pages after the first", pages)
	}
	if list := testkit.MustDecode[testkit.JSONList](t, f.do("GET", "/-/v1/keys", "")); len(list.Items) != listLimitDefault || *list.After != keys[listLimitDefault-1] {
		t.Errorf("%d items", len(list.Items))
	}
}

// TestTurns: a long read rests twice as long as it has worked, but only while there are writes.
// Pages at an exact version are of that one, or they are refused.
func TestHTTP_ExactPages(t *testing.T) {
	f := newFront(t)
	for i := range 10 {
		f.put(fmt.Sprint("k/", i), "v")
	}
	f.put("other", "v")
	page := func(after string, rv uint64) testkit.Answer {
		return f.do("GET", fmt.Sprintf("/-/v1/keys?prefix=k/&limit=3&resourceVersionMatch=exact&resourceVersion=%d&after=%s", rv, after), "")
	}
	rv := f.store.Version()
	f.put("other", "another")
	f.put("l", "not of the list, nor before it")
	f.put("k", "nor this")
	want := func(a testkit.Answer, keys int) {
		t.Helper()
		a.Want(t, 200)
		list := testkit.MustDecode[testkit.JSONList](t, a)
		if len(list.Items) != keys || list.ResourceVersion != rv || a.Header.Get("Resource-Version") != fmt.Sprint(rv) || a.Header.Get("Cluster-Id") != "abc" {
			t.Errorf("%s %v", a.Body, a.Header)
		}
	}
	want(page("", rv), 3)
	f.put("k/1", "changed") // on a page that the client has
	want(page("k/2", rv), 3)
	f.put("k/50", "new")
	want(page("k/50", rv), 3)
	for _, query := range []string{"k/4", ""} {
		a := page(query, rv)
		a.Want(t, 410)
		if p := mustProblem(t, a); p.Code != "expired" || !strings.Contains(p.Detail, "have changed after resource version 11") {
			t.Errorf("%+v", p)
		}
	}
	a := f.do("GET", fmt.Sprintf("/-/v1/keys?prefix=k/&resourceVersionMatch=exact&resourceVersion=%d&after=k/6", rv), "", "Accept: application/x-ndjson")
	a.Want(t, 200)
	if !strings.HasSuffix(a.Body, fmt.Sprintf(`{"resourceVersion":%d,"count":3}`+"\n", rv)) {
		t.Errorf("%s", a.Body)
	}
	f.do("GET", fmt.Sprintf("/-/v1/keys?prefix=k/&resourceVersionMatch=exact&resourceVersion=%d", rv), "", "Accept: application/x-ndjson").Want(t, 410)
	rv = f.store.Version()
	f.fillWindow()
	page("", rv).Want(t, 410) // nobody knows
	for _, query := range []string{"resourceVersionMatch=exact", "resourceVersionMatch=exact&resourceVersion=0", "resourceVersionMatch=Exact&resourceVersion=1"} {
		f.do("GET", "/-/v1/keys?"+query, "").Want(t, 400)
	}
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv := store.New()
		turn := turns{store: kv, began: time.Now()}
		for _, tt := range []struct {
			writes       bool
			worked, want time.Duration
		}{
			{true, streamTurn, 0}, // not yet
			{true, time.Millisecond, 2 * (streamTurn + time.Millisecond)},
			{false, 3 * time.Millisecond, 0},
			{true, 3 * time.Millisecond, 6 * time.Millisecond},
			{true, streamTurn, 0}, // a turn begins after the rest
			{true, time.Second, streamRestMax},
			{false, time.Second, 0},
			{true, streamTurn, 0}, // or where one would have been
		} {
			if tt.writes {
				c := store.Command{Op: store.OpPut, Key: "a", Value: "1"}
				if _, err := kv.Apply(kv.Applied()+1, 1, store.BatchHeader{Session: 1, Seq: kv.Applied() + 1}, c.AppendTo(nil), nil); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(tt.worked)
			start := time.Now()
			turn.rest()
			if got := time.Since(start); got != tt.want {
				t.Errorf("%+v: rested for %v", tt, got)
			}
		}
	})
}

// A stream has the items of one version, although they change while it is read.
func TestHTTP_StreamBesideWrites(t *testing.T) {
	f := newFront(t)
	const n = 50_000
	for i := range n {
		f.put(fmt.Sprintf("key-%05d", i), "old")
	}
	c := f.mustDial()
	if _, err := io.WriteString(c, "GET /-/v1/keys HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := res.Header.Get("Resource-Version"); got != fmt.Sprint(n) {
		t.Errorf("version %s", got)
	}
	for i := range n {
		if i%3 == 0 {
			f.put(fmt.Sprintf("key-%05d", i), "new")
		} else if i%3 == 1 {
			f.put(fmt.Sprintf("key-%05d-more", i), "new")
		}
	}
	if _, err := f.backend.Apply(t.Context(), 0, store.Command{Op: store.OpDeletePrefix, Key: "key-4"}); err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	items := decodeLines(t, string(body))
	if len(items) != n {
		t.Fatalf("%d items", len(items))
	}
	for i, it := range items {
		if it.RawKey() != fmt.Sprintf("key-%05d", i) || it.RawValue() != "old" || it.ResourceVersion > n {
			t.Fatalf("item %d: %+v", i, it)
		}
	}
}

func TestHTTP_TooManyStreams(t *testing.T) {
	f := newFront(t)
	for range store.ScansMax {
		sc, err := f.store.Scan("", "")
		if err != nil {
			t.Fatal(err)
		}
		defer sc.Close()
	}
	a := f.do("GET", "/-/v1/keys", "", "Accept: application/x-ndjson")
	a.Want(t, 429)
	a.WantHeader(t, "Retry-After", "1")
	if p := mustProblem(t, a); p.Code != "too-many-requests" || !p.Retryable || p.Outcome != "" {
		t.Errorf("%+v", p)
	}
	f.do("GET", "/-/v1/keys", "").Want(t, 200)
}

// TestHTTP_ListSize: a JSON list ends before it has more than 8 MiB, and what comes after can be asked for.
func TestHTTP_ListSize(t *testing.T) {
	for name, value := range map[string]string{
		"text": strings.Repeat("v", 90<<10), "escapes": strings.Repeat("\x01", 90<<10), "bytes": strings.Repeat("\xff", 90<<10),
		"short escapes": strings.Repeat("\n\"", 1<<10), "small": "v",
	} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t)
			n := min(listSizeMax*9/8/len(store.AppendItemJSON(nil, "key-000000", store.Item{Value: value, RV: 1000, Created: 1000}, false)), 9000)
			for i := range n {
				f.put(fmt.Sprintf("key-%06d", i), value)
			}
			got, largest := 0, 0
			for after := ""; ; {
				a := f.do("GET", "/-/v1/keys?limit=10000&after="+after, "")
				a.Want(t, 200)
				list := testkit.MustDecode[testkit.JSONList](t, a)
				for _, it := range list.Items {
					if it.RawKey() != fmt.Sprintf("key-%06d", got) || it.RawValue() != value {
						t.Fatalf("item %d is %s with %d bytes", got, it.RawKey(), len(it.RawValue()))
					}
					got++
				}
				largest = max(largest, len(a.Body))
				if list.After == nil {
					break
				}
				after = *list.After
			}
			if got != n || largest > listSizeMax || name != "small" && largest < listSizeMax*9/10 {
				t.Errorf("%d of %d items, the largest answer has %d bytes", got, n, largest)
			}
		})
	}
	f := newFront(t)
	f.store.State.Items.Set("a", store.Item{Value: strings.Repeat("v", listSizeMax), RV: 1}) // larger than --max-value-bytes was once
	f.put("b", "v")
	if list := testkit.MustDecode[testkit.JSONList](t, f.do("GET", "/-/v1/keys", "")); len(list.Items) != 1 || list.After == nil || *list.After != "a" {
		t.Errorf("%d items of which one is too large", len(list.Items))
	}
	if list := testkit.MustDecode[testkit.JSONList](t, f.do("GET", "/-/v1/keys?keysOnly=true", "")); len(list.Items) != 2 {
		t.Errorf("%d keys", len(list.Items))
	}
}

// TestStream_LargeValues: what goes out in pieces is the same as in one.
func TestStream_LargeValues(t *testing.T) {
	for _, value := range []string{
		strings.Repeat("v\n\"é", 30<<10), strings.Repeat("\x00\xff", 40<<10) + "x", strings.Repeat("v", streamBufferSize), strings.Repeat("v", streamBufferSize+1),
		strings.Repeat("é", streamBufferSize),
	} {
		w := httptest.NewRecorder()
		s := newStream(w, request{Request: httptest.NewRequest("GET", "/", nil)}, typeJSON)
		it := store.Item{Value: value, RV: 7, Created: 3, Expires: 1}
		s.appendItem("k", it, false)
		if got := cap(s.buf); got > 4*streamBufferSize {
			t.Errorf("it took %d bytes", got)
		}
		s.end()
		if want := store.AppendItemJSON(nil, "k", it, false); !bytes.Equal(w.Body.Bytes(), want) {
			t.Errorf("%d bytes, want %d", w.Body.Len(), len(want))
		}
		size, exact := store.ItemJSONSize(store.KeyItem{Key: "k", Item: it}, false), w.Body.Len()
		if most := store.ItemSizeMax(store.KeyItem{Key: "k", Item: it}, false); size < exact || size > exact+store.ItemFixedSize || most < size {
			t.Errorf("size %d, at most %d, is %d", size, most, exact)
		}
	}
}

// TestHTTP_ListPlaces: whoever has all lists that one address may have keeps neither others from theirs, nor anybody from
// small lists and backups.
func TestHTTP_ListPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		for i := range 2 * fewItems {
			f.put(fmt.Sprintf("key-%03d", i), "v")
		}
		here, other := shares.AddressOf("pipe"), netip.MustParseAddr("192.0.2.1")
		for f.api.lists.Take(here, 1) {
		}
		stream := []string{"Accept: application/x-ndjson"}
		f.do("GET", "/-/v1/keys", "", stream...).Want(t, 429)
		f.do("GET", "/-/v1/keys", "").Want(t, 429)
		f.do("GET", "/-/v1/watch?initial=true", "").Want(t, 429)
		f.do("GET", "/-/v1/keys?prefix=key-00", "").Want(t, 200)
		f.do("GET", "/-/v1/backup", "").Want(t, 200)
		if !f.api.lists.Take(other, 1) {
			t.Error("nothing is left for others")
		}
		go func() { // while it waits
			time.Sleep(placeTimeout / 4)
			f.api.lists.Give(here, 1)
		}()
		f.do("GET", "/-/v1/keys", "").Want(t, 200)
		f.do("GET", "/-/v1/keys", "", stream...).Want(t, 200)

		for f.api.backups.Take(here, 1) {
		}
		f.do("GET", "/-/v1/backup", "").Want(t, 429)
		f.do("GET", "/-/v1/keys", "", stream...).Want(t, 200)
		synctest.Wait() // the last answer was ahead of the end of its request
		if f.api.lists.Taken != shares.MostOf(listsMax) || f.api.backups.Taken != shares.MostOf(backupsMax) {
			t.Errorf("%d lists, %d backups", f.api.lists.Taken, f.api.backups.Taken)
		}
	})
}

// Who reads slowly gets all of it, if not slower than a few kilobytes a second. Who does not read at
// all is cut off, and cannot take what it has for the whole.
func TestHTTP_SlowStream(t *testing.T) {
	const most = streamWriteTimeout * 64 << 10 / streamPaceSize // for one line
	for _, pause := range []time.Duration{most / 2, 2 * most} {
		t.Run(pause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newPipeFront(t)
				const n = 50
				for i := range n {
					f.put(fmt.Sprintf("key-%02d", i), strings.Repeat("v", 64<<10))
				}
				c := f.mustDial()
				if _, err := io.WriteString(c, "GET /-/v1/keys HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\r\n"); err != nil {
					t.Fatal(err)
				}
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					t.Fatal(err)
				}
				lines := 0
				r := bufio.NewReaderSize(res.Body, 128<<10)
				for {
					time.Sleep(pause)
					var line []byte
					if line, err = r.ReadBytes('\n'); err != nil {
						break
					}
					lines++
					if !json.Valid(line) {
						t.Errorf("line %d", lines)
					}
				}
				if pause < most {
					if !errors.Is(err, io.EOF) || lines != n+1 {
						t.Errorf("%d lines, then %v", lines, err)
					}
				} else if !errors.Is(err, io.ErrUnexpectedEOF) || lines >= n {
					t.Errorf("%d lines, then %v", lines, err)
				}
				synctest.Wait()
				if left := len(f.store.State.Scans); left != 0 {
					t.Errorf("%d scans are left", left)
				}
			})
		})
	}
}

// A scan that must give up ends the connection, not the response.
func TestHTTP_StreamThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		for i := range store.ScanPart { // the first part, most of which waits for the client
			f.put(fmt.Sprintf("a%03d", i), strings.Repeat("v", 1<<10))
		}
		const n = 70
		for i := range n {
			f.put(fmt.Sprintf("b%03d", i), strings.Repeat("v", 1<<20))
		}
		c := f.mustDial()
		if _, err := io.WriteString(c, "GET /-/v1/keys HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i := range n {
			f.put(fmt.Sprintf("b%03d", i), "new")
		}
		body, err := io.ReadAll(res.Body)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes, then %v", len(body), err)
		}
		synctest.Wait()
		if f.logs.FilterMessage("cut off a stream of keys").Len() != 1 {
			t.Errorf("%v", f.logs.All())
		}
	})
}

func TestHTTP_DeletePrefix(t *testing.T) {
	f := newFront(t)
	for _, key := range []string{"a", "a/1", "a/2", "b"} {
		f.put(key, "v")
	}
	type deleted struct{ Deleted, ResourceVersion uint64 }
	a := f.do("DELETE", "/-/v1/keys?prefix=a%2F", "")
	if got := testkit.MustDecode[deleted](t, a); got != (deleted{2, 5}) {
		t.Errorf("%+v", got)
	}
	a.WantHeader(t, "Resource-Version", "5")
	if got := testkit.MustDecode[deleted](t, f.do("DELETE", "/-/v1/keys?prefix=a/", "")); got != (deleted{0, 5}) {
		t.Errorf("%+v", got)
	}
	if list, _ := f.store.List("", "", 10); len(list) != 2 || list[0].Key != "a" || list[1].Key != "b" {
		t.Errorf("%+v", list)
	}
	for i := range store.DeletePrefixMax + 1 {
		f.put(fmt.Sprintf("many/%d", i), "v")
	}
	before := f.store.Version()
	a = f.do("DELETE", "/-/v1/keys?prefix=many", "", "Idempotency-Key: a")
	a.Want(t, 413)
	if p := mustProblem(t, a); p.Code != "too-many-keys" || p.Outcome != fault.NotApplied || !strings.Contains(p.Detail, strconv.Itoa(store.DeletePrefixMax)) {
		t.Errorf("%+v", p)
	}
	if rv := f.store.Version(); rv != before {
		t.Errorf("version %d, want %d", rv, before)
	}
	f.do("DELETE", "/many/0", "").Want(t, 204)
	a = f.do("DELETE", "/-/v1/keys?prefix=many", "", "Idempotency-Key: a")
	a.Want(t, 413) // the same request, the same answer
	a.WantHeader(t, "Idempotency-Replayed", "true")
	if got := testkit.MustDecode[deleted](t, f.do("DELETE", "/-/v1/keys?prefix=many", "", "Idempotency-Key: b")); got != (deleted{store.DeletePrefixMax, before + 2}) {
		t.Errorf("%+v", got)
	}
}

// streamed are the calls whose answers have no length, and what says that one of
// them is whole.
var streamed = map[string]func(body string) error{
	"/-/v1/keys": func(body string) error {
		if strings.HasPrefix(body, `{"resourceVersion":`) && strings.Contains(body, `"items":[`) {
			return json.Unmarshal([]byte(body), new(any))
		}
		_, _, err := readStream(body)
		return err
	},
	"/-/v1/backup": func(body string) error {
		path := filepath.Join(os.TempDir(), "raftrv-stream-test")
		defer func() { _ = os.Remove(path) }() // a leftover does no harm
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			return nil // which fails the test
		}
		_, err := store.ReadBackup(path)
		return err
	},
	"/-/v1/watch": func(body string) error {
		if body == "" || !strings.HasSuffix(body, "\n") {
			return io.ErrUnexpectedEOF
		}
		lines := strings.Split(strings.TrimSpace(body), "\n")
		if last := lines[len(lines)-1]; !strings.HasPrefix(last, `{"type":"BOOKMARK"`) && !strings.HasPrefix(last, `data: {"type":"BOOKMARK"`) {
			return io.ErrUnexpectedEOF // resume
		}
		return nil
	},
}

// Over HTTP/1.0, and behind some proxies, an answer that is cut off ends like any
// other. So each has a length, or an end of its own, or is refused.
func TestHTTP_StreamsEndVisibly(t *testing.T) {
	f := newFront(t)
	for i := range 300 {
		f.put(fmt.Sprintf("k%03d", i), strings.Repeat("v", 1000))
	}
	for _, rt := range allRoutes() {
		c := rt.Call(http.MethodGet)
		if c == nil {
			continue
		}
		target := strings.NewReplacer("{key}", "k001", "{profile}", "heap").Replace(rt.path)
		if strings.HasSuffix(rt.path, "/watch") {
			target += "?resourceVersion=0&timeout=100ms"
		}
		for _, accept := range []string{"*/*", "application/x-ndjson"} {
			got := f.exchange("GET " + target + " HTTP/1.0\r\nAccept: " + accept + "\r\n\r\n")
			head, body, _ := strings.Cut(got, "\r\n\r\n")
			if strings.HasPrefix(head, "HTTP/1.0 505") || strings.Contains(head, fmt.Sprintf("\r\nContent-Length: %d\r\n", len(body))) {
				continue
			}
			whole := streamed[rt.path]
			if whole == nil || !strings.HasPrefix(head, "HTTP/1.0 200") {
				t.Errorf("%s: nobody knows where this ends:\n%s", rt.path, head)
				continue
			}
			if err := whole(body); err != nil {
				t.Errorf("%s: %v", rt.path, err)
			}
			for cut := range len(body) { // at every line, and here and there
				if (body[cut] == '\n' || cut%997 == 0) && cut+1 < len(strings.TrimRight(body, "\n")) && whole(body[:cut+1]) == nil && rt.path != "/-/v1/watch" {
					t.Errorf("%s: %d of %d bytes pass for all", rt.path, cut+1, len(body))
					break
				}
			}
		}
	}
}

// The same where the node itself gives up.
func TestHTTP_StreamThatFailsOverHTTP10(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		for i := range store.ScanPart {
			f.put(fmt.Sprintf("a%03d", i), strings.Repeat("v", 1<<10))
		}
		const n = 70
		for i := range n {
			f.put(fmt.Sprintf("b%03d", i), strings.Repeat("v", 1<<20))
		}
		c := f.mustDial()
		if _, err := io.WriteString(c, "GET /-/v1/keys HTTP/1.0\r\nHost: x\r\nAccept: application/x-ndjson\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i := range n {
			f.put(fmt.Sprintf("b%03d", i), "new")
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if items, _, err := readStream(string(body)); err == nil {
			t.Errorf("%d items of %d pass for all", len(items), store.ScanPart+n)
		}
		synctest.Wait()
		if got := testkit.Gather(t, f.config.Registry)[`raftrv_http_requests_total{code="500",method="GET",route="/-/v1/keys"}`]; got != 1 {
			t.Errorf("%v requests count as cut off", got)
		}
	})
}

// TestHTTP_StreamsThroughProxies: the same over HTTP/1.1 behind a proxy that takes what it has for the whole when
// the connection to the node breaks, whether it buffers all of it or passes on pieces of its own.
func TestHTTP_StreamsThroughProxies(t *testing.T) {
	f := newFront(t)
	for i := range 100 {
		f.put(fmt.Sprintf("k%03d", i), strings.Repeat("v", 1000))
	}
	for path, whole := range streamed {
		target, accept := path, "application/x-ndjson"
		if path == "/-/v1/watch" {
			target += "?resourceVersion=0&timeout=100ms"
		}
		for _, accept := range []string{accept, "application/json", "text/event-stream"} {
			if accept == "text/event-stream" && path != "/-/v1/watch" {
				continue
			}
			for _, buffers := range []bool{true, false} {
				size, most := 0, -1 // of the first answer: all
				for try := range 20 {
					proxy := httptest.NewServer(cuttingProxy(t, f, accept, most, buffers))
					res, err := http.Get(proxy.URL + target)
					testkit.Must(t, err)
					b, err := io.ReadAll(res.Body)
					testkit.Must(t, errors.Join(err, res.Body.Close())) // the client notices nothing
					proxy.Close()
					body := string(b)
					if res.StatusCode != http.StatusOK || most >= 0 && len(body) != most {
						t.Fatalf("%s: %d, %d bytes", target, res.StatusCode, len(body))
					}
					err = whole(body)
					if accept == "text/event-stream" { // an event counts when the blank line after it has come
						err = nil
						if !strings.HasSuffix(body, "\n\n") {
							err = errors.New("half an event")
						}
					}
					switch {
					case most < 0 && err != nil:
						t.Errorf("%s: not whole: %v", target, err)
					case most >= 0 && err == nil && (path != "/-/v1/watch" || body[len(body)-1] != '\n'):
						t.Errorf("%s as %s: %d of %d bytes pass for all", target, accept, most, size)
					}
					if most < 0 {
						size = len(body)
					}
					most = 1 + size*try/20
					if try%2 == 0 { // the end of a line is where it is hardest to see
						if i := strings.IndexByte(body[min(most, len(body)):], '\n'); i >= 0 && most+i+1 < size-1 {
							most += i + 1
						}
					}
				}
			}
		}
	}
}

// cuttingProxy passes on the first bytes of an answer, all of them if most is negative, as if they were the whole.
func cuttingProxy(t *testing.T, f *front, accept string, most int, buffers bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := f.mustDial()
		defer c.Close() // within the answer
		go func() {
			_, _ = fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nAccept: %s\r\n\r\n", r.URL.RequestURI(), accept)
		}()
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Error(err)
			return
		}
		body := io.Reader(res.Body)
		if most >= 0 {
			body = io.LimitReader(body, int64(most))
		}
		w.Header().Set("Content-Type", res.Header.Get("Content-Type"))
		if buffers {
			b, _ := io.ReadAll(body)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b)
			return
		}
		for buf := make([]byte, 777); ; {
			n, err := body.Read(buf)
			_, _ = w.Write(buf[:n])
			_ = http.NewResponseController(w).Flush()
			if err != nil {
				return
			}
		}
	})
}
