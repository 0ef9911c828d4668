package httpapi

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
	"raftrv/internal/watch"
	"raftrv/internal/watchcheck"
)

// watchConn is the client's side of one watch.
type watchConn struct {
	t      *testing.T
	conn   net.Conn
	res    *http.Response
	body   *bufio.Reader
	status int
}

// watch starts a watch and reads the header of the answer.
func (f *front) watch(query string, headers ...string) *watchConn {
	f.t.Helper()
	c := f.mustDial()
	raw := "GET /-/v1/watch?" + query + " HTTP/1.1\r\nHost: x\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
	go func() { _, _ = io.WriteString(c, raw) }()          // a pipe has no buffer
	res, err := http.ReadResponse(bufio.NewReader(c), nil) //nolint:bodyclose // it would read to the end of what has none
	if err != nil {
		f.t.Fatal(err)
	}
	return &watchConn{t: f.t, conn: c, res: res, body: bufio.NewReader(res.Body), status: res.StatusCode}
}

// line returns the next line, or "" at the end.
func (w *watchConn) line() string {
	w.t.Helper()
	s, err := w.body.ReadString('\n')
	if err != nil && err != io.EOF {
		w.t.Fatal(err)
	}
	return strings.TrimSuffix(s, "\n")
}

// want reads lines and compares them.
func (w *watchConn) want(lines ...string) {
	w.t.Helper()
	if w.status != http.StatusOK {
		w.t.Fatalf("status %d: %s", w.status, w.line())
	}
	for _, want := range lines {
		if got := w.line(); got != want {
			w.t.Fatalf("got  %s\nwant %s", got, want)
		}
	}
}

// wantEnd expects that the stream has ended, and well.
func (w *watchConn) wantEnd() {
	w.t.Helper()
	if rest, err := io.ReadAll(w.body); len(rest) > 0 || err != nil {
		w.t.Fatalf("at the end: %q, %v", rest, err)
	}
}

// next reads the next message of NDJSON.
func (w *watchConn) next() watchcheck.Message {
	w.t.Helper()
	m, err := watchcheck.Parse([]byte(w.line()))
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// apply carries out a command as if a client had sent it.
func (f *front) apply(c store.Command) store.Result {
	f.t.Helper()
	res, err := f.backend.Apply(f.t.Context(), 0, c)
	if err != nil {
		f.t.Fatal(err)
	}
	return res[0]
}

func bookmarkLine(rv uint64) string {
	return fmt.Sprintf(`{"type":"BOOKMARK","object":{"resourceVersion":%d}}`, rv)
}

// watchStory writes one of everything that a watch tells of.
func (f *front) watchStory() {
	f.put("a", "1")
	f.apply(store.Command{Op: store.OpPut, Key: "a", Value: "2", Expires: 1767323045678})
	f.apply(store.Command{Op: store.OpExpire, Key: "a", Condition: store.Condition{Kind: store.IfMatch, RV: 2}})
	both := store.Txn{Then: []store.Command{{Op: store.OpPut, Key: "a\"/\xff", Value: "\x00\n\xff"}, {Op: store.OpPut, Key: "b", Value: "é<\u2028"}}}
	f.apply(store.Command{Op: store.OpTxn, Value: both.Encode()})
	f.apply(store.Command{Op: store.OpDelete, Key: "b"})
}

func TestWatch_Lines(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	w := f.watch("resourceVersion=0")
	if got := w.res.Header; got.Get("Content-Type") != "application/x-ndjson" || got.Get("Resource-Version") != "0" || got.Get("Cache-Control") != "no-store" {
		t.Errorf("header %v", got)
	}
	w.want(
		`{"type":"ADDED","object":{"key":"a","value":"1","resourceVersion":1,"createdResourceVersion":1}}`,
		`{"type":"MODIFIED","object":{"key":"a","value":"2","resourceVersion":2,"createdResourceVersion":1,"expiresAt":"2026-01-02T03:04:05.678Z","previousResourceVersion":1}}`,
		`{"type":"DELETED","object":{"key":"a","value":"2","resourceVersion":3,"createdResourceVersion":1,"expiresAt":"2026-01-02T03:04:05.678Z","previousResourceVersion":2,"reason":"expired"}}`,
		`{"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true,"resumeFrom":3}`,
		"{\"type\":\"ADDED\",\"object\":{\"key\":\"b\",\"value\":\"é<\u2028\",\"resourceVersion\":4,\"createdResourceVersion\":4}}",
		`{"type":"DELETED","object":{"key":"b","value":"é<`+"\u2028"+`","resourceVersion":5,"createdResourceVersion":4,"previousResourceVersion":4}}`,
	)
	f.put("b", "live")
	w.want(`{"type":"ADDED","object":{"key":"b","value":"live","resourceVersion":6,"createdResourceVersion":6}}`)
	// The version is complete for whom the rest does not concern.
	f.watch("resourceVersion=3&prefix=a%22").want(`{"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4}}`)
	f.watch("resourceVersion=1&key=b").want("{\"type\":\"ADDED\",\"object\":{\"key\":\"b\",\"value\":\"é<\u2028\",\"resourceVersion\":4,\"createdResourceVersion\":4}}")
}

func TestWatch_ServerSentEvents(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	w := f.watch("resourceVersion=2", "Accept: text/html, text/event-stream;q=0.9")
	if got := w.res.Header.Get("Content-Type"); got != "text/event-stream" {
		t.Errorf("Content-Type %s", got)
	}
	w.want(
		"retry: 1000", "",
		"event: DELETED", "id: abc-3",
		`data: {"type":"DELETED","object":{"key":"a","value":"2","resourceVersion":3,"createdResourceVersion":1,"expiresAt":"2026-01-02T03:04:05.678Z","previousResourceVersion":2,"reason":"expired"}}`, "",
		"event: ADDED",
		`data: {"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true,"resumeFrom":3}`, "",
		"event: ADDED", "id: abc-4",
		"data: {\"type\":\"ADDED\",\"object\":{\"key\":\"b\",\"value\":\"é<\u2028\",\"resourceVersion\":4,\"createdResourceVersion\":4}}", "",
	)
	// The header wins: a browser repeats the URL that it began with.
	w = f.watch("resourceVersion=0&initial=true", "Accept: text/event-stream", "Last-Event-ID: 4")
	w.want("retry: 1000", "", "event: DELETED", "id: abc-5")
	// From now: the first message says where that is.
	f.watch("", "Accept: text/event-stream", "Last-Event-ID:").want(
		"retry: 1000", "", "event: BOOKMARK", "id: abc-5", "data: "+bookmarkLine(5), "")
	// So does an empty store, or else a browser would not know where to resume.
	newFront(t).watch("", "Accept: text/event-stream").want("retry: 1000", "", "event: BOOKMARK", "id: abc-0")
	// A list has no id before its end.
	f.watch("initial=true", "Accept: text/event-stream").want(
		"retry: 1000", "", "event: ADDED",
		`data: {"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true}`, "",
		"event: BOOKMARK", "id: abc-5", "data: "+bookmarkLine(5), "")
}

func TestWatch_Start(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	// From now on is from after what was acknowledged anywhere.
	before := f.backend.linearizations()
	w := f.watch("")
	if f.backend.linearizations() != before+1 {
		t.Error("not linearized")
	}
	w.want(bookmarkLine(5))
	if got := w.res.Header.Get("Resource-Version"); got != "5" {
		t.Errorf("Resource-Version %s", got)
	}
	f.put("c", "3")
	w.want(`{"type":"ADDED","object":{"key":"c","value":"3","resourceVersion":6,"createdResourceVersion":6}}`)

	// A version that is here needs no leader, one that is not needs one.
	before = f.backend.linearizations()
	f.watch("resourceVersion=6")
	f.watch("key=c&resourceVersion=0&initial=true").want(
		`{"type":"ADDED","object":{"key":"c","value":"3","resourceVersion":6,"createdResourceVersion":6},"more":true}`, bookmarkLine(6))
	if f.backend.linearizations() != before {
		t.Error("linearized for nothing")
	}
	for _, header := range []string{"X: y", "Last-Event-ID: 7"} {
		w = f.watch("resourceVersion=7", header)
		if p := w.problem(); w.status != 400 || p.Code != "invalid-request" || !strings.Contains(p.Detail, "7 is in the future: the store is at 6") {
			t.Errorf("%d %+v", w.status, p)
		}
	}
	if f.backend.linearizations() != before+2 {
		t.Error("refused without asking the leader")
	}
	f.watch("key=nothing&initial=true").want(bookmarkLine(6))
	f.watch("prefix=nothing&initial=true").want(bookmarkLine(6))
	f.backend.fail(fault.ErrNoLeader)
	for _, query := range []string{"", "initial=true", "resourceVersion=9"} {
		if w := f.watch(query); w.status != 503 {
			t.Errorf("%q without a leader: %d", query, w.status)
		}
	}
	f.watch("resourceVersion=5").want(`{"type":"ADDED","object":{"key":"c","value":"3","resourceVersion":6,"createdResourceVersion":6}}`)
}

// problem reads the answer to a watch that did not start.
func (w *watchConn) problem() Problem {
	w.t.Helper()
	body, err := io.ReadAll(w.body)
	if err != nil {
		w.t.Fatal(err)
	}
	return mustProblem(w.t, testkit.Answer{Code: w.status, Header: w.res.Header, Body: string(body), Last: w.res.Close})
}

func TestWatch_Refused(t *testing.T) {
	f := newFront(t)
	for query, detail := range map[string]string{
		"key=a&prefix=a": "exclude each other",
		"key=":           "the key or prefix has 0 bytes",
		"prefix=" + strings.Repeat("x", store.KeySizeMax+1): "has 4097 bytes",
		"initial=yes":       "initial must be true or false",
		"limit=3":           `unknown parameter "limit"; allowed here: resourceVersion, prefix, key, initial, timeout`,
		"timeout=25h":       "at most 24h0m0s",
		"timeout=0s":        "more than 0",
		"resourceVersion=x": "decimal",
		"key=%":             "malformed escape",
	} {
		w := f.watch(query)
		if p := w.problem(); w.status != 400 || !strings.Contains(p.Detail, detail) {
			t.Errorf("%s: %d %+v", query, w.status, p)
		}
	}
	for _, id := range []string{"x", "-1", "1.5", "18446744073709551616"} {
		if w := f.watch("", "Last-Event-ID: "+id); w.status != 400 {
			t.Errorf("Last-Event-ID %s: %d", id, w.status)
		}
	}
	a := f.do("HEAD", "/-/v1/watch?resourceVersion=0", "")
	a.Want(t, 200)
	a.WantHeader(t, "Content-Type", "application/x-ndjson")
	a.WantHeader(t, "Resource-Version", "0")
	a = f.do("HEAD", "/-/v1/watch?initial=true", "")
	a.Want(t, 200)
}

// fillWindow writes until the window has lost what was there before.
func (f *front) fillWindow() {
	f.t.Helper()
	storetest.ShrinkWindow(f.store, store.ChunkEventsMax, 64<<20)
	for start := f.store.Version(); f.store.EventsDropped() <= start; {
		f.put("filler", "x")
	}
}

func TestWatch_Expired(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	f.fillWindow()
	for _, header := range []string{"X: y", "Last-Event-ID: 4"} {
		w := f.watch("resourceVersion=4", header)
		p := w.problem()
		if w.status != 410 || p.Code != "expired" || p.Retryable || !strings.Contains(p.Detail, "initial=true") {
			t.Errorf("%d %+v", w.status, p)
		}
	}
	rv := f.store.Version()
	f.watch("prefix=a&initial=true").want(
		`{"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true}`, bookmarkLine(rv))
	f.watch(fmt.Sprint("resourceVersion=", f.store.EventsDropped())).want(
		fmt.Sprintf(`{"type":"MODIFIED","object":{"key":"filler","value":"x","resourceVersion":%d,"createdResourceVersion":6,"previousResourceVersion":%d}}`,
			f.store.EventsDropped()+1, f.store.EventsDropped()))
}

// A browser resumes by itself, and gives up for good after a 410. So one that wants
// the items first gets them again, and is told that they are all there is.
func TestWatch_ListsAgain(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	f.fillWindow()
	rv := f.store.Version()
	f.watch("prefix=a&initial=true", "Last-Event-ID: 4").want(
		fmt.Sprintf(`{"type":"RELIST","object":{"resourceVersion":%d},"more":true}`, rv),
		`{"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true}`, bookmarkLine(rv))
	w := f.watch("prefix=a&initial=true", "Last-Event-ID: 4", "Accept: text/event-stream")
	w.want("retry: 1000", "", "event: RELIST", fmt.Sprintf(`data: {"type":"RELIST","object":{"resourceVersion":%d},"more":true}`, rv), "")
	// One that is not too late goes on where it was.
	f.put("a", "new")
	f.watch("prefix=a&initial=true", fmt.Sprint("Last-Event-ID: ", rv)).want(
		fmt.Sprintf(`{"type":"ADDED","object":{"key":"a","value":"new","resourceVersion":%d,"createdResourceVersion":%[1]d}}`, rv+1))
}

// What a watch of another cluster was told says nothing about this one, whatever the number is. A number alone
// is what a person has typed.
func TestWatch_AnotherCluster(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	event := `{"type":"DELETED","object":{"key":"b","value":"é<` + "\u2028" + `","resourceVersion":5,"createdResourceVersion":4,"previousResourceVersion":4}}`
	for _, own := range []string{"4", "abc-4"} {
		f.watch("resourceVersion=" + own).want(event)
		f.watch("", "Last-Event-ID: "+own).want(event)
		f.watch("initial=true", "Last-Event-ID: "+own).want(event)
	}
	if got := f.watch("resourceVersion=4").res.Header.Get("Cluster-Id"); got != "abc" {
		t.Errorf("Cluster-Id %s", got)
	}
	for _, rv := range []string{"4", "5", "6", "1000000000000"} {
		for _, how := range [][2]string{{"resourceVersion=abd-" + rv, "X: y"}, {"resourceVersion=4", "Last-Event-ID: abd-" + rv}} {
			w := f.watch(how[0], how[1])
			if p := w.problem(); w.status != 410 || p.Code != "expired" || !strings.Contains(p.Detail, "of cluster abd, and this is cluster abc") {
				t.Errorf("%v: %d %+v", how, w.status, p)
			}
		}
		for _, how := range [][2]string{{"key=b&initial=true&resourceVersion=abd-" + rv, "X: y"}, {"key=b&initial=true", "Last-Event-ID: abd-" + rv}} {
			f.watch(how[0], how[1]).want(`{"type":"RELIST","object":{"resourceVersion":5},"more":true}`, bookmarkLine(5))
		}
	}
	for _, id := range []string{"abc-", "-4", "xyz-4", "abc-x", "abc-4-4", "abc 4"} {
		if w := f.watch("", "Last-Event-ID: "+id); w.status != 400 {
			t.Errorf("Last-Event-ID %s: %d", id, w.status)
		}
		if w := f.watch("resourceVersion=" + strings.ReplaceAll(id, " ", "+")); w.status != 400 {
			t.Errorf("resourceVersion %s: %d", id, w.status)
		}
	}
}

// The last message of a watch is no outcome of a write, and of one that expired no
// version to resume from.
func TestWatch_ErrorMessage(t *testing.T) {
	for _, tt := range []struct {
		err     *fault.Error
		version string
	}{{fault.ErrShuttingDown, `"resourceVersion":0`}, {fault.ErrExpired, ""}} {
		f := newFront(t)
		w := f.watch("resourceVersion=0")
		f.hub.Close(tt.err)
		line := w.line()
		if !strings.HasPrefix(line, `{"type":"ERROR"`) || strings.Contains(line, "outcome") || tt.version == "" && strings.Contains(line, `"resourceVersion"`) || !strings.Contains(line, tt.version) {
			t.Errorf("%v: %s", tt.err, line)
		}
	}
}

// Who resumes from "resumeFrom" of any message that has one misses nothing.
func TestWatch_ResumeFrom(t *testing.T) {
	f := newFront(t)
	f.watchStory()
	f.watch("resourceVersion=3").want(
		`{"type":"ADDED","object":{"keyBase64":"YSIv/w==","valueBase64":"AAr/","resourceVersion":4,"createdResourceVersion":4},"more":true,"resumeFrom":3}`)
	if line := f.watch("initial=true").line(); strings.Contains(line, "resumeFrom") {
		t.Errorf("half a list: %s", line)
	}
}

// TestWatch_List: a long list is of one version while writes go on, and the
// events continue it.
func TestWatch_List(t *testing.T) {
	f := newFront(t)
	r := &watchcheck.History{}
	record := func() {
		from := r.Last()
		w, err := f.hub.Watch("", true, from)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		for {
			n, _, err := w.Read(func(e *store.Event, last bool) {
				c := *e
				c.Last = last
				r.Messages = append(r.Messages, watchcheck.MessageOf(c))
			})
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				return
			}
		}
	}
	value := strings.Repeat("x", 1000)
	for i := range 10_000 { // more than the buffers between here and there
		f.put(fmt.Sprintf("k/%05d", i), value)
	}
	f.put("other", value)
	w := f.watch("initial=true&prefix=k/")
	v := watchcheck.New("list", "k/", true, true, 0)
	v.Observe(w.next())
	for i := range 10_000 {
		switch i % 3 {
		case 0:
			f.put(fmt.Sprintf("k/%05d", i), "new")
		case 1:
			f.apply(store.Command{Op: store.OpDelete, Key: fmt.Sprintf("k/%05d", i)})
		case 2:
			f.put(fmt.Sprintf("k/%05d+", i), "new")
		}
	}
	f.put("k/the end", "")
	for v.Done < f.store.Version() {
		v.Observe(w.next())
	}
	record()
	v.Check(r)
	v.Report(t)
	if len(v.Listed) != 10_000 || v.Events != 10_001 {
		t.Errorf("%d items, %d events", len(v.Listed), v.Events)
	}
}

func TestWatch_LargeVersion(t *testing.T) {
	f := newFront(t)
	const n = 30_000
	for i := range n {
		f.put(fmt.Sprintf("k/%05d", i), "v")
	}
	w := f.watch(fmt.Sprint("resourceVersion=", n))
	f.apply(store.Command{Op: store.OpDeletePrefix, Key: "k/"})
	for i := range n {
		if m := w.next(); m.Kind != "DELETED" || m.RV != n+1 || m.Prev != uint64(i+1) || m.More != (i < n-1) {
			t.Fatalf("message %d: %v", i, m)
		}
	}
}

// TestWatch_Bookmarks: they come in time, on a quiet watch and on a busy one,
// for longer than the deadlines that other requests have.
// TestWatch_LargeVersionReadSlowly: neither a bookmark nor the end of a timed watch comes within a version, however
// long its client takes to read it.
func TestWatch_LargeVersionReadSlowly(t *testing.T) {
	for _, query := range []string{"", "&timeout=5s"} {
		synctest.Test(t, func(t *testing.T) {
			f := newPipeFront(t)
			const n = 3 * watch.ReadEventsMax
			for i := range n {
				f.put(fmt.Sprintf("k/%05d", i), "v")
			}
			w := f.watch(fmt.Sprint("resourceVersion=", n, query))
			f.apply(store.Command{Op: store.OpDeletePrefix, Key: "k/"})
			start := time.Now()
			for i := range n {
				if i%100 == 0 {
					time.Sleep(3 * time.Second)
				}
				if m := w.next(); m.Kind != "DELETED" || m.RV != n+1 || m.More != (i < n-1) {
					t.Fatalf("message %d: %v", i, m)
				}
			}
			if took := time.Since(start); took < 20*time.Second {
				t.Errorf("bad test: it took %v", took)
			}
			w.want(bookmarkLine(n + 1))
			_ = w.conn.Close()
		})
	}
}

func TestWatch_Bookmarks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		quiet, busy := f.watch("key=nothing"), f.watch("prefix=k")
		start := time.Now()
		quiet.want(bookmarkLine(0))
		busy.want(bookmarkLine(0))
		stop := make(chan struct{})
		writing := make(chan struct{})
		go func() {
			defer close(writing)
			for {
				select {
				case <-stop:
					return
				case <-time.After(300 * time.Millisecond):
					f.put("k", "v")
				}
			}
		}()
		done := make(chan struct{})
		go func() {
			defer close(done)
			last, events := start, 0
			for time.Since(start) < 2*writeTimeout {
				switch m := busy.next(); m.Kind {
				case "BOOKMARK":
					if since := time.Since(last); since > 10*time.Second {
						t.Errorf("%v between bookmarks", since)
					}
					last = time.Now()
				case "ERROR":
					t.Error(m)
				default:
					events++
				}
			}
			if events < 1000 {
				t.Errorf("%d events", events)
			}
		}()
		bookmarks := 0
		for last := start; time.Since(start) < 2*writeTimeout; last = time.Now() {
			m := quiet.next()
			since := time.Since(last)
			if m.Kind != "BOOKMARK" || since > 10*time.Second || since < 5*time.Second {
				t.Errorf("%v after %v", m, since)
			}
			if want := uint64(time.Since(start) / (300 * time.Millisecond)); m.RV+1 < want || m.RV > want {
				t.Errorf("bookmark %d, want %d", m.RV, want)
			}
			bookmarks++
		}
		if bookmarks < 36 {
			t.Errorf("%d bookmarks", bookmarks)
		}
		<-done
		close(stop)
		<-writing
	})
}

func TestWatch_Timeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		f.put("a", "1")
		start := time.Now()
		w := f.watch("key=b&timeout=25s&resourceVersion=0")
		for i, at := range []time.Duration{8 * time.Second, 16 * time.Second, 24 * time.Second, 25 * time.Second} {
			if i == 3 {
				f.put("a", "2")
			}
			w.want(bookmarkLine(1 + uint64(i)/3))
			if since := time.Since(start); since != at {
				t.Errorf("bookmark after %v, want %v", since, at)
			}
		}
		w.wantEnd()
		// The connection can be used again.
		if _, err := io.WriteString(w.conn, "GET /a HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if a := testkit.ReadAnswer(t, bufio.NewReader(w.conn), "GET"); a.Code != 200 || a.Body != "2" {
			t.Errorf("then %+v", a)
		}
	})
}

func TestWatch_Shutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		f.put("a", "1")
		lines, events := f.watch("resourceVersion=0"), f.watch("", "Accept: text/event-stream")
		lines.next()
		events.want("retry: 1000", "", "event: BOOKMARK", "id: abc-1", "data: "+bookmarkLine(1), "")
		f.hub.Close(fault.ErrShuttingDown)
		if m := lines.next(); m.Kind != "ERROR" || m.Code != "shutting-down" || m.RV != 1 {
			t.Errorf("%v", m)
		}
		lines.wantEnd()
		events.want("event: ERROR", "id: abc-1")
		m, err := watchcheck.Parse([]byte(strings.TrimPrefix(events.line(), "data: ")))
		if err != nil || m.Code != "shutting-down" || m.RV != 1 {
			t.Errorf("%v %v", m, err)
		}
		events.want("")
		events.wantEnd()
		w := f.watch("resourceVersion=1")
		if m := w.next(); m.Code != "shutting-down" {
			t.Errorf("a watch that starts then: %v", m)
		}
	})
}

// TestWatch_ClientGone: the handler notices, whether or not there is something
// to say.
func TestWatch_ClientGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		w := f.watch("")
		w.next()
		synctest.Wait()
		if n := f.armed(); n != 1 {
			t.Errorf("%d armed", n)
		}
		if err := w.conn.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := f.armed(); n != 0 {
			t.Errorf("%d armed after the client had left", n)
		}
	})
}

func (f *front) armed() int {
	f.hub.Mu.Lock()
	defer f.hub.Mu.Unlock()
	return f.hub.Armed
}

// TestWatch_NeverReads: a client that takes nothing is cut off in time, and one
// that takes little is not.
func TestWatch_NeverReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		never, little := f.watch(""), f.watch("")
		never.next()
		little.next()
		start := time.Now()
		f.put("k", strings.Repeat("x", 90<<10))
		for range 4 { // 10 s are for 32 KiB
			time.Sleep(4 * time.Second)
			if _, err := io.ReadFull(little.body, make([]byte, 20<<10)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.ReadAll(never.body); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the one that never reads got a whole stream: %v", err)
		}
		little.line()
		f.put("k", "y")
		m := little.next()
		for m.Kind == "BOOKMARK" {
			m = little.next()
		}
		if m.Value != "y" {
			t.Errorf("the slow one got %v", m)
		}
		if since := time.Since(start); since > time.Minute {
			t.Errorf("took %v", since)
		}
	})
}

// TestWatch_TooSlow: who falls behind is told where to resume, and can.
func TestWatch_TooSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newPipeFront(t)
		storetest.ShrinkWindow(f.store, 16*store.ChunkEventsMax, 64<<20)
		w := f.watch("resourceVersion=0")
		v := watchcheck.New("slow", "", true, false, 0)
		for range store.ChunkEventsMax + 100 { // the second chunk
			f.put("k", "v")
			v.Observe(w.next())
		}
		synctest.Wait()
		// It takes one event, which its client does not read until the first chunk
		// has left the window.
		for f.store.EventsDropped() == 0 {
			f.put("k", "v")
			synctest.Wait()
		}
		v.Observe(w.next())
		m := w.next()
		if m.Kind != "ERROR" || m.Code != "watch-too-slow" || m.RV != v.Done || m.RV != store.ChunkEventsMax+101 {
			t.Errorf("%v after %d", m, v.Done)
		}
		w.wantEnd()
		resumed := f.watch(fmt.Sprint("resourceVersion=", v.Resume()))
		for v.Done < f.store.Version() {
			v.Observe(resumed.next())
		}
		if v.Events != int(f.store.Version()) {
			t.Errorf("%d events, %d versions", v.Events, f.store.Version())
		}
		v.Report(t)

		// Who is even slower has lost events, and is told that.
		w = f.watch(fmt.Sprint("resourceVersion=", f.store.Version()))
		synctest.Wait()
		rv := f.store.Version() + 1
		for f.store.EventsDropped() <= rv {
			f.put("k", "v")
			synctest.Wait()
		}
		if m := w.next(); m.RV != rv {
			t.Errorf("%v", m)
		}
		if m := w.next(); m.Code != "expired" || m.RV != 0 { // there is nothing to resume
			t.Errorf("%v", m)
		}
		w.wantEnd()
	})
}

func TestWatch_ManyParts(t *testing.T) {
	f := newFront(t)
	value := bytes.Repeat([]byte("\x01"), 100<<10) // six bytes each in JSON
	w := f.watch("resourceVersion=0")
	f.put("k", string(value))
	f.put("k", "small")
	if m := w.next(); m.Value != string(value) || m.RV != 1 {
		t.Errorf("%v", m)
	}
	if m := w.next(); m.Value != "small" {
		t.Errorf("%v", m)
	}
}

// TestWatch_LargeValues: what is written in pieces is the same as in one, between small ones, in lists and as events.
func TestWatch_LargeValues(t *testing.T) {
	f := newFront(t)
	values := []string{
		strings.Repeat("v\n\"é", 15<<10), "small", strings.Repeat("\x00\xff", 25<<10) + "x", strings.Repeat("é", 40<<10), "", strings.Repeat("v", watch.ReadBytesMax),
	}
	for i, v := range values {
		f.put(fmt.Sprint("k", i), v)
	}
	for _, query := range []string{"initial=true", "resourceVersion=0"} {
		w := f.watch(query)
		for i, v := range values {
			if m := w.next(); m.Value != v || m.RV != uint64(i+1) {
				t.Errorf("%s: item %d: %d bytes at %d, want %d", query, i, len(m.Value), m.RV, len(v))
			}
		}
	}
	w := f.watch(fmt.Sprint("resourceVersion=", len(values)))
	f.put("k1", values[0])
	f.put("k1", values[2])
	f.put("k1", "small")
	for _, want := range []string{values[0], values[2], "small"} {
		if m := w.next(); m.Value != want || m.Kind != "MODIFIED" {
			t.Errorf("%s with %d bytes, want %d", m.Kind, len(m.Value), len(want))
		}
	}
	s := &WatchStream{} // however many there are, they do not copy it
	s.appendEvent(&store.Event{Kind: store.EventAdded, Key: "k", RV: 2, Item: store.Item{Value: values[0], RV: 2}}, true)
	if n := len(*s.buf); n > 200 {
		t.Errorf("%d bytes are copied", n)
	}
}

// A deletion tells the value that was deleted unless that was too large to be kept.
func TestWatch_DeletedValue(t *testing.T) {
	for _, cut := range []bool{false, true} {
		s := &WatchStream{}
		s.appendEvent(&store.Event{Kind: store.EventDeleted, Key: "k", RV: 2, Prev: 1, Cut: cut}, true)
		if got := strings.Contains(string(*s.buf), `"value":"`); got == cut {
			t.Errorf("cut %v: %s", cut, *s.buf)
		}
	}
}
