// Package browser tests raftrv with a real browser: Chromium without a window, driven by chromedp. Without a
// browser the tests are skipped.
package browser

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"raftrv/internal/proc"
)

// timeout bounds a whole test.
const timeout = 2 * time.Minute

// findBrowser skips the test where there is no browser.
func findBrowser(t *testing.T) string {
	t.Helper()
	names := []string{"chromium", "chromium-browser", "google-chrome", "chrome"}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skipf("SKIPPED: none of %s is installed (Debian: apt-get install chromium)", strings.Join(names, ", "))
	return ""
}

// newBrowser starts a browser and returns the context of its one tab.
func newBrowser(t *testing.T) context.Context {
	t.Helper()
	path := findBrowser(t)
	// Not t.Context, which ends before the browser was asked to.
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx,
		chromedp.ExecPath(path),
		chromedp.UserDataDir(t.TempDir()),
		chromedp.Headless,
		chromedp.NoSandbox, // containers run it as root
		chromedp.DisableGPU,
		chromedp.NoFirstRun,
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-dev-shm-usage", true),
		chromedp.Flag("disable-sync", true),
		// A name that leads to a node although it is none of its names, and one that may be.
		chromedp.Flag("host-resolver-rules", "MAP evil.example 127.0.0.1, MAP node1 127.0.0.1"),
	)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil { // waits for the process
			t.Error("end browser:", err)
		}
		cancel()
	})
	return ctx
}

// newCluster starts three nodes, or one.
func newCluster(t *testing.T, nodes int, args ...string) *proc.Cluster {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "raftrv")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	c, err := proc.NewCluster(proc.Options{Binary: binary, Nodes: nodes, Args: append([]string{"--watch-bookmark", "200ms"}, args...)})
	must(t, err)
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	start(t, c)
	return c
}

// start starts the nodes that have no process and waits until all are ready.
func start(t *testing.T, c *proc.Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	must(t, c.Start(ctx))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// message is what the page got: an event, or that a connection was made or lost.
type message struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data string `json:"data"`
}

// follow is the whole client.
const follow = `
	var messages = [];
	var source = new EventSource(%q);
	for (const type of ["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR"])
		source.addEventListener(type, e => messages.push({type: e.type, id: e.lastEventId, data: e.data}));
	source.onopen = () => messages.push({type: "open"});
	source.onerror = () => messages.push({type: "lost"});`

// TestEventSource: a page follows a prefix through one node, which is killed and started
// again, again and again. The browser alone resumes, and misses and repeats nothing.
func TestEventSource(t *testing.T) {
	ctx := newBrowser(t)
	page := newPage(t)
	c := newCluster(t, 3, "--allowed-origin", page)
	node, other := c.Nodes[0], c.Nodes[1]

	must(t, chromedp.Do(ctx,
		chromedp.Navigate(page),
		chromedp.Evaluate[chromedp.Void](fmt.Sprintf(follow, node.URL()+"/-/v1/watch?prefix=k/")),
	))
	waitFor(t, ctx, `messages.some(m => m.type == "BOOKMARK")`)

	w := &writer{t: t, url: other.URL()}
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.write()
			}
		}
	})
	const kills = 4
	for i := range kills {
		time.Sleep(500 * time.Millisecond)
		if i%2 == 0 {
			must(t, node.Kill())
		} else {
			stopCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
			must(t, node.Stop(stopCtx))
			cancel()
		}
		time.Sleep(500 * time.Millisecond)
		start(t, c)
		waitFor(t, ctx, fmt.Sprintf(`messages.filter(m => m.type == "open").length >= %d`, i+2))
	}
	close(stop)
	writing.Wait()
	w.write()
	last := w.events[len(w.events)-1]
	waitFor(t, ctx, fmt.Sprintf(`messages.some(m => m.id?.endsWith("-%d") && m.type != "BOOKMARK")`, last.rv))
	messages, err := chromedp.Run(ctx, chromedp.Evaluate[[]message]("messages"))
	must(t, err)
	check(t, messages, w.events)
	t.Logf("%d events over %d connections, of which %d were lost; %d bookmarks, %d errors",
		len(w.events), count(messages, "open"), count(messages, "lost"), count(messages, "BOOKMARK"), count(messages, "ERROR"))
}

func count(messages []message, kind string) int {
	n := 0
	for _, m := range messages {
		if m.Type == kind {
			n++
		}
	}
	return n
}

// waitFor waits until a condition holds in the page.
func waitFor(t *testing.T, ctx context.Context, condition string) {
	t.Helper()
	for {
		ok, err := chromedp.Run(ctx, chromedp.Evaluate[bool](condition))
		if err != nil {
			t.Fatalf("waiting for %s: %v", condition, err)
		}
		if ok {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// event is what a write does.
type event struct {
	Type, Key, Value string
	rv               uint64
	more             bool
}

// writer writes one thing after the other and knows what events that makes.
type writer struct {
	t      *testing.T
	url    string
	n      int
	known  map[string]bool
	events []event
}

// write makes one transaction of keys that are watched and one that is not.
func (w *writer) write() {
	w.n++
	if w.known == nil {
		w.known = map[string]bool{}
	}
	var then []map[string]string
	var events []event
	for i := range 1 + w.n%5 {
		e := event{Type: "ADDED", Key: fmt.Sprintf("k/%d", (w.n*3+i)%20), Value: fmt.Sprintf("%d\n%d", w.n, i)}
		if w.known[e.Key] {
			e.Type = "MODIFIED"
		}
		w.known[e.Key] = true
		events = append(events, e)
		then = append(then, map[string]string{"op": "put", "key": e.Key, "value": e.Value})
	}
	then = append(then, map[string]string{"op": "put", "key": "other", "value": "x"})
	body, err := json.Marshal(map[string]any{"then": then})
	if err != nil {
		w.t.Error(err)
		return
	}
	res, err := http.Post(w.url+"/-/v1/txn?"+url.Values{"timeout": {"20s"}}.Encode(), "application/json", strings.NewReader(string(body)))
	if err != nil {
		w.t.Error(err)
		return
	}
	defer res.Body.Close()
	var answer struct{ ResourceVersion uint64 }
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || res.StatusCode != http.StatusOK {
		w.t.Errorf("POST: %s, %v", res.Status, err)
		return
	}
	for i := range events {
		events[i].rv, events[i].more = answer.ResourceVersion, i < len(events)-1
	}
	w.events = append(w.events, events...)
}

// check holds what the page got against what was written. What came of an incomplete version before a connection
// was lost comes again.
func check(t *testing.T, messages []message, want []event) {
	t.Helper()
	var part []event
	done := uint64(0)
	for i, m := range messages {
		switch m.Type {
		case "open":
			part = nil
			continue
		case "lost", "ERROR":
			continue
		}
		var data struct {
			Type   string
			More   bool
			Object struct {
				Key, Value      string
				ResourceVersion uint64
			}
		}
		if err := json.Unmarshal([]byte(m.Data), &data); err != nil || data.Type != m.Type {
			t.Fatalf("message %d: %+v, %v", i, m, err)
		}
		o := data.Object
		if m.Type == "BOOKMARK" {
			if len(part) > 0 || o.ResourceVersion < done {
				t.Fatalf("message %d: bookmark %d after %d, and %v", i, o.ResourceVersion, done, part)
			}
			done = o.ResourceVersion
			continue
		}
		// The id of a message that has none is that of the last one that had.
		if id := fmt.Sprint("-", o.ResourceVersion); strings.HasSuffix(m.ID, id) == data.More {
			t.Errorf("message %d: id %s of %s", i, m.ID, m.Data)
		}
		part = append(part, event{Type: data.Type, Key: o.Key, Value: o.Value, rv: o.ResourceVersion, more: data.More})
		if data.More {
			continue
		}
		for _, e := range part {
			if len(want) == 0 || e != want[0] {
				t.Fatalf("message %d: got %+v, want %+v", i, e, want[:min(len(want), 1)])
			}
			want = want[1:]
		}
		part, done = nil, o.ResourceVersion
	}
	if len(want) > 0 {
		t.Errorf("%d events did not come, the first is %+v", len(want), want[0])
	}
}
