package browser

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
)

// newPage serves an empty page and returns its origin.
func newPage(t *testing.T) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<!doctype html><title>a page</title><body>") // the browser may be gone
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// request sends a request as a program does.
func request(t *testing.T, method, url, body string) (status int, text string) {
	t.Helper()
	return requestTo(t, "", method, url, body, "")
}

// requestTo is request to a node by another name, of a body with a type.
func requestTo(t *testing.T, host, method, url, body, contentType string) (status int, text string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	must(t, err)
	req.Host = host
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := http.DefaultClient.Do(req)
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(t, err)
	return res.StatusCode, string(b)
}

// attacks is all that a page can try. It notes what each came to: "refused", or
// what it got.
const attacks = `
	var node = %q, results = {}, waiting = 0;
	function attempt(name, make) {
		waiting++;
		const end = result => { if (!(name in results)) { results[name] = String(result); waiting--; } };
		try { make(end); } catch (e) { end("refused"); }
		setTimeout(() => end("refused"), 5000);
	}
	function request(name, path, options) {
		attempt(name, end => fetch(node + path, options).then(r => r.type == "opaque" ? end("sent") : r.text().then(end), () => end("refused")));
	}
	const txn = '{"then":[{"op":"put","key":"written","value":"v"}]}';
	request("read", "/secret");
	request("read unseen", "/secret", {mode: "no-cors"});
	request("backup", "/-/v1/backup");
	request("put", "/written", {method: "PUT", body: "v"});
	request("delete", "/secret", {method: "DELETE"});
	request("post", "/", {method: "POST", body: "v"});
	request("post unseen", "/", {method: "POST", mode: "no-cors", body: "v"});
	request("member", "/66", {method: "POST", mode: "no-cors", body: "http://10.0.0.66:1"});
	request("transaction", "/-/v1/txn", {method: "POST", mode: "no-cors", body: txn});
	request("leader", "/-/v1/leader/1", {method: "POST", mode: "no-cors"});
	attempt("beacon", end => end(navigator.sendBeacon(node + "/-/v1/txn", txn) ? "sent" : "refused"));
	function element(name, tag, attributes) {
		attempt(name, end => {
			const e = document.createElement(tag);
			Object.assign(e, attributes);
			e.onload = () => {
				if (tag != "iframe") return end("loaded");
				try { end(e.contentDocument.body.innerText); } catch { end("refused"); }
			};
			e.onerror = () => end("refused");
			document.body.append(e);
		});
	}
	element("image", "img", {src: node + "/image"});
	element("script", "script", {src: node + "/script"});
	element("frame", "iframe", {src: node + "/secret"});
	element("style", "link", {rel: "stylesheet", href: node + "/style"});
	attempt("events", end => {
		const s = new EventSource(node + "/-/v1/watch?initial=true");
		s.onopen = () => end("opened");
		s.onerror = () => { s.close(); end("refused"); };
	});
	attempt("socket", end => {
		const s = new WebSocket(node.replace("http", "ws") + "/-/v1/watch");
		s.onopen = () => end("opened");
		s.onerror = () => end("refused");
	});
	attempt("form", end => {
		const frame = document.createElement("iframe"), form = document.createElement("form"), field = document.createElement("input");
		frame.name = "target";
		Object.assign(form, {method: "post", action: node + "/-/v1/txn", enctype: "text/plain", target: "target"});
		Object.assign(field, {name: txn.slice(0, -1) + ',"else":[{"op":"get","key":"', value: '"}]}'});
		form.append(field);
		document.body.append(frame, form);
		frame.onload = () => { try { end(frame.contentDocument.body.innerText); } catch { end("refused"); } };
		form.submit();
	});`

// attack lets a page try all of it, and returns what that came to.
func attack(t *testing.T, page, node string) map[string]string {
	ctx := newBrowser(t)
	must(t, chromedp.Do(ctx,
		chromedp.Navigate(page),
		chromedp.Evaluate[chromedp.Void](fmt.Sprintf(attacks, node)),
	))
	waitFor(t, ctx, "waiting == 0")
	results, err := chromedp.Run(ctx, chromedp.Evaluate[map[string]string]("results"))
	must(t, err)
	if len(results) != 18 {
		t.Errorf("%d attempts: %v", len(results), results)
	}
	return results
}

// pixel is an image.
var pixel = mustDecode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==")

func mustDecode(s string) string {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// steal is a page that writes as soon as it is run.
const steal = `<!doctype html><title>run</title><body>this is <script>document.title = "stolen"; fetch("/stolen", {method: "PUT", body: "v"})</script>`

// fill writes what pages try to read, each as what it is, and returns the version then.
func fill(t *testing.T, node string) string {
	t.Helper()
	for key, value := range map[string][2]string{
		"secret": {"the secret", "text/plain"},
		"image":  {pixel, "image/png"},
		"script": {"var stolen = 1", "text/javascript"},
		"style":  {"body { color: red }", "text/css"},
		"html":   {steal, "text/html"},
		"xhtml":  {`<html xmlns="http://www.w3.org/1999/xhtml"><script>fetch("/stolen", {method: "PUT", body: "v"})</script></html>`, "application/xhtml+xml"},
		"svg":    {`<svg xmlns="http://www.w3.org/2000/svg"><script>fetch("/stolen", {method: "PUT", body: "v"})</script></svg>`, "image/svg+xml"},
		"plain":  {steal, "text/plain; charset=utf-8"},
		"untold": {steal, ""},
	} {
		if status, text := requestTo(t, "", http.MethodPut, node+"/"+key, value[0], value[1]); status != http.StatusCreated {
			t.Fatalf("%s: %d %s", key, status, text)
		}
	}
	_, version := request(t, http.MethodGet, node+"/", "")
	return version
}

func wantUntouched(t *testing.T, node, version string) {
	t.Helper()
	if _, now := request(t, http.MethodGet, node+"/", ""); now != version {
		_, keys := request(t, http.MethodGet, node+"/-/v1/keys", "")
		t.Errorf("version %s, was %s: %s", now, version, keys)
	}
	if _, members := request(t, http.MethodGet, node+"/-/v1/members", ""); strings.Contains(members, "10.0.0.66") {
		t.Errorf("members: %s", members)
	}
}

// TestOrigin_Other: a page of another origin writes nothing and reads nothing.
func TestOrigin_Other(t *testing.T) {
	findBrowser(t)
	c := newCluster(t, 1)
	node := c.Nodes[0].URL()
	version := fill(t, node)
	for name, result := range attack(t, newPage(t), node) {
		if result != "refused" && result != "sent" || result == "sent" && strings.HasPrefix(name, "read") {
			t.Errorf("%s: %.200s", name, result)
		}
	}
	wantUntouched(t, node, version)
}

// TestOrigin_Values: a value that is opened in a browser is not run, whatever its writer said that it is.
func TestOrigin_Values(t *testing.T) {
	findBrowser(t)
	c := newCluster(t, 1)
	node := c.Nodes[0].URL()
	version := fill(t, node)
	for _, key := range []string{"html", "xhtml", "svg", "untold", "script", "plain"} {
		ctx := newBrowser(t)
		err := chromedp.Do(ctx, chromedp.Navigate(node+"/"+key))
		if key != "plain" {
			if err == nil || !strings.Contains(err.Error(), "ERR_ABORTED") { // it is a download
				t.Errorf("%s: %v", key, err)
			}
			continue
		}
		must(t, err)
		text, err := chromedp.Run(ctx, chromedp.Evaluate[string]("document.title + document.documentElement.innerText"))
		must(t, err)
		if text != steal {
			t.Errorf("text is shown as %q", text)
		}
	}
	wantUntouched(t, node, version)
}

// TestOrigin_AllowedHost: programs that know a node by a name which it was told go on, and pages gain nothing by it.
func TestOrigin_AllowedHost(t *testing.T) {
	findBrowser(t)
	c := newCluster(t, 1, "--allowed-host", "node1")
	node := c.Nodes[0].URL()
	version := fill(t, node)
	named := strings.Replace(node, "127.0.0.1", "node1", 1)
	for name, result := range attack(t, newPage(t), named) {
		if result != "refused" && result != "sent" || result == "sent" && strings.HasPrefix(name, "read") {
			t.Errorf("%s: %.200s", name, result)
		}
	}
	wantUntouched(t, node, version)
	for _, call := range []struct {
		method, path, body string
		status             int
	}{
		{http.MethodPut, "/composed", "v", 201}, {http.MethodGet, "/composed", "", 200}, {http.MethodDelete, "/composed", "", 204}, {http.MethodPost, "/", "v", 201}, {http.MethodPatch, "/", "{}", 204},
		{http.MethodPost, "/-/v1/txn", `{"then":[{"op":"put","key":"composed","value":"v"}]}`, 200}, {http.MethodGet, "/-/v1/keys?prefix=c", "", 200}, {http.MethodGet, "/-/v1/watch?timeout=1ms", "", 200},
		{http.MethodGet, "/-/readyz", "", 200}, {http.MethodGet, "/-/metrics", "", 200},
	} {
		for _, host := range []string{strings.TrimPrefix(named, "http://"), strings.TrimPrefix(node, "http://"), "localhost"} {
			status, text := requestTo(t, host, call.method, node+call.path, call.body, "")
			if status != call.status {
				t.Errorf("%s %s of %s: %d %.200s", call.method, call.path, host, status, text)
			}
			if call.method == http.MethodPut || call.method == http.MethodDelete {
				break // it is another answer the second time
			}
		}
	}
	if status, text := requestTo(t, "node2:12380", http.MethodGet, node+"/secret", "", ""); status != http.StatusMisdirectedRequest {
		t.Errorf("by a name that is not its own: %d %s", status, text)
	}
}

// TestOrigin_Rebound: a page whose name leads to the node, so that the two are of
// one origin, reads and writes no more than that.
func TestOrigin_Rebound(t *testing.T) {
	findBrowser(t)
	c := newCluster(t, 1)
	node := c.Nodes[0].URL()
	version := fill(t, node)
	rebound := strings.Replace(node, "127.0.0.1", "evil.example", 1)
	page := newPage(t)
	for name, result := range attack(t, page, rebound) { // from the name of the page
		if result != "refused" && result != "sent" {
			t.Errorf("%s: %.200s", name, result)
		}
	}
	ctx := newBrowser(t)
	must(t, chromedp.Do(ctx, chromedp.Navigate(rebound+"/secret")))
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string]("document.documentElement.innerText"))
	must(t, err)
	if strings.Contains(text, "the secret") || !strings.Contains(text, "unknown-host") {
		t.Errorf("the page is %q", text)
	}
	wantUntouched(t, node, version)
}

// TestOrigin_Allowed: a page of an origin that is allowed writes and reads all.
func TestOrigin_Allowed(t *testing.T) {
	findBrowser(t)
	page := newPage(t)
	c := newCluster(t, 1, "--allowed-origin", page)
	node := c.Nodes[0].URL()
	fill(t, node)
	ctx := newBrowser(t)
	must(t, chromedp.Do(ctx,
		chromedp.Navigate(page),
		chromedp.Evaluate[chromedp.Void](fmt.Sprintf(`
			var node = %q, results = {}, done = false;
			(async () => {
				results.secret = await (await fetch(node + "/secret")).text();
				const put = await fetch(node + "/written", {method: "PUT", headers: {"If-None-Match": "*", "Idempotency-Key": "k"}, body: "v"});
				results.put = put.status + " " + (put.headers.get("ETag") != null) + " " + (put.headers.get("Resource-Version") != null);
				results.refused = String((await fetch(node + "/written", {method: "PUT", headers: {"If-None-Match": "*"}, body: "v"})).status);
				results.gone = String((await fetch(node + "/written", {method: "DELETE"})).status);
				results.event = await new Promise(end => {
					const s = new EventSource(node + "/-/v1/watch?key=secret&initial=true");
					s.addEventListener("ADDED", e => { s.close(); end(JSON.parse(e.data).object.value); });
					s.onerror = () => end("refused");
				});
			})().catch(e => results.failed = String(e)).finally(() => done = true);`, node)),
	))
	waitFor(t, ctx, "done")
	results, err := chromedp.Run(ctx, chromedp.Evaluate[map[string]string]("results"))
	must(t, err)
	want := map[string]string{"secret": "the secret", "put": "201 true true", "refused": "412", "gone": "204", "event": "the secret"}
	if fmt.Sprint(results) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", results, want)
	}
}
