package tests

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// rawHostile is what somebody sends to a port who is no client, or one who tries
// what is not meant for him. None of it may write anything.
type rawHostile struct {
	kind string
	raw  string
	want string // beginnings of statuses of clients' answers that fit, such as "40 501", or "none"
}

// hostileCanary is in each of them that has a header: it must not be logged.
const hostileCanary = "canary-7c1fd0"

// rawRequest writes a request to a host that is a node's own.
func rawRequest(method, target, body string, headers ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n", method, target, hostileCanary)
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	if body != "" {
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	}
	return b.String() + "\r\n" + body
}

// hostileToBoth are messages that are as wrong at one port as at the other.
func hostileToBoth() (all []rawHostile) {
	// Smuggling: two who read the same bytes must not see two different requests.
	const second = "PUT /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\nx"
	smuggle := func(headers, body string) {
		all = append(all, rawHostile{"smuggling", "POST /-/none HTTP/1.1\r\nHost: 127.0.0.1\r\n" + headers + "\r\n" + body + second, "40 41 50"})
	}
	n := len(second)
	for _, lengths := range []string{
		"Content-Length: 0\r\nContent-Length: %d\r\n", "Content-Length: %d\r\nContent-Length: 0\r\n", "Content-Length: 0, %d\r\n", "Content-Length: +%d\r\n", "Content-Length: -%d\r\n",
		"Content-Length: 0x%d\r\n", "Content-Length: %d.0\r\n", "Content-Length: 1e%d\r\n", "Content-Length: %d a\r\n", "Content-Length: 9999999999999999999%d\r\n",
		"Content-Length : %d\r\n", "Content-Length\t: %d\r\n", "X: a\rContent-Length: %d\r\n", "X: a\x00\r\nContent-Length: %d\r\n", " Content-Length: %d\r\n",
		"X: a\n\n\rContent-Length: %d\r\n", // the first request ends there, and the second is none
	} {
		smuggle(fmt.Sprintf(lengths, n), "")
	}
	for _, encoding := range []string{
		"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n", "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
		"Transfer-Encoding: xchunked\r\n", "Transfer-Encoding: chunked, chunked\r\n", "Transfer-Encoding: identity\r\n", "Transfer-Encoding: gzip, chunked\r\n",
		"Transfer-Encoding: \"chunked\"\r\n", "Transfer-Encoding: chunked;q=1\r\n", "Transfer-Encoding : chunked\r\n", "Transfer-Encoding: \x0bchunked\r\n",
		"Transfer-Encoding:\r\n chunked\r\nContent-Length: 6\r\n", "Transfer-Encoding: chunked\r\n",
	} {
		smuggle(encoding, "0\r\n\r\n")
	}
	for _, chunks := range []string{
		"0x0\r\n\r\n", "+0\r\n\r\n", "-1\r\n\r\n", "FFFFFFFFFFFFFFFF\r\n", "10000000000000000\r\n", "0 \r\n\r\n", "1\r\nxx\r\n0\r\n\r\n", "1\nx\n0\n\n", "g\r\n\r\n", "1;" + strings.Repeat("e", 10_000) + "\r\nx\r\n0\r\n\r\n",
		"0;ext\r\n\r\n", "0\r\nContent-Length: 5\r\n\r\n",
	} {
		smuggle("Transfer-Encoding: chunked\r\n", chunks)
	}
	// Request lines, and what is none.
	for _, raw := range []string{
		"\r\n\r\n", "\n\n", "\x00\r\n\r\n", "GET\r\n\r\n", "GET /\r\n\r\n", "GET / HTTP/0.9\r\n\r\n", "GET / HTTP/1\r\n\r\n", "GET / HTTP/1.\r\n\r\n", "GET / HTTP/1.10\r\n\r\n", "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
		"GET / HTTP/9.9\r\nHost: a\r\n\r\n", "GET / http/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1 x\r\nHost: a\r\n\r\n", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
		" GET / HTTP/1.1\r\nHost: a\r\n\r\n", "G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n", "G(T / HTTP/1.1\r\nHost: a\r\n\r\n", "\xc3\xa9 / HTTP/1.1\r\nHost: a\r\n\r\n", strings.Repeat("M", 8192) + " / HTTP/1.1\r\nHost: a\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("\x00", 200), "SSH-2.0-x\r\n\r\n", "*1\r\n$4\r\nPING\r\n\r\n", "EHLO x\r\n\r\n",
		"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n", "TRACE / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: " + hostileCanary + "\r\n\r\n",
		"GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\x00\r\n\r\n",
		"GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\nno colon\r\n\r\n", "GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\n: empty\r\n\r\n", "GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\nX Y: z\r\n\r\n", "GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\nX\x00: z\r\n\r\n",
		"GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\x01\r\n\r\n", "GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + strings.Repeat("v", 64<<10) + "\r\n\r\n",
		"GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\n" + strings.Repeat("X: v\r\n", 10_000) + "\r\n", "GET /none HTTP/1.1\r\nHost: 127.0.0.1\r\n" + strings.Repeat("x", 64<<10) + ": v\r\n\r\n",
		"GET /" + strings.Repeat("a", 64<<10) + " HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
	} {
		all = append(all, rawHostile{"request line", raw, "none 40 41 42 43 50"})
	}
	return all
}

// hostileToClients are messages to the port of clients beside those.
func hostileToClients() (all []rawHostile) {
	add := func(kind, want, raw string) { all = append(all, rawHostile{kind, raw, want}) }
	// Targets: nothing is cleaned, decoded twice or taken for a call that it is not.
	for _, target := range []string{
		"//-/v1/status", "/./-/v1/status", "/../-/v1/status", "/a/../-/v1/status", "/%2D/v1/status", "/%2d/v1/status", "/-%2Fv1%2Fstatus", "/-%2fv1/status", "/%2F-/v1/status", "/-\\v1\\status", "/;/-/v1/status",
		"/-/v1%2Fstatus", "/-/v1//status", "/-//v1/status", "/-/./v1/status", "/-/v1/status/", "/-/v1/status/..", "/-/v1/status%00", "/-/v1/status;a=b", "/-/V1/status", "/-/v1/STATUS", "/-", "/-/", "/-/v1", "/-/v1/", "/-/v2/keys",
		"/%zz", "/%", "/%2", "/%u0041", "/a%", "/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/" + strings.Repeat("k", 4097), "/" + strings.Repeat("%41", 4097), "/" + strings.Repeat("../", 1000),
		"http://evil.example/-/none", "http:///-/none", "https://evil.example:99999/-/none", "ftp://a/b", "a", "a:80", "?", "#", "*", "http:", "//", "http://[::1/", "-/v1/status",
		"/none?x=1", "/none?timeout", "/none?timeout=", "/none?timeout=0", "/none?timeout=-1s", "/none?timeout=1h", "/none?timeout=1s&timeout=1s", "/none?timeout=%zz", "/none?timeout=NaN", "/none?timeout=9223372036854775807h",
		"/none?resourceVersion=-1", "/none?resourceVersion=18446744073709551616", "/none?resourceVersion=1.5", "/none?resourceVersion=0x1", "/none?ttl=1s", "/none?" + strings.Repeat("a=b&", 1000),
		"/-/v1/keys?limit=0", "/-/v1/keys?limit=-1", "/-/v1/keys?limit=99999999999999999999", "/-/v1/keys?limit=10001", "/-/v1/keys?keysOnly=yes", "/-/v1/keys?prefix=%zz", "/-/v1/keys?unknown", "/-/v1/keys/", "/-/v1/keys/none", "/-/v1/keys/%zz",
		"/-/v1/watch?timeout=-1s", "/-/v1/watch?timeout=0", "/-/v1/watch?key=a&prefix=b", "/-/v1/watch?key=", "/-/v1/watch?resourceVersion=18446744073709551615", "/-/v1/watch?initial=1", "/-/v1/watch?prefix=" + strings.Repeat("k", 4097),
		"/-/debug/pprof/", "/-/debug/pprof/heap", "/-/debug/pprof/../../v1/status", "/-/v1/members/1", "/-/v1/leader/1", "/-/v1/txn",
	} {
		for _, method := range []string{"GET", "HEAD"} {
			add("target", "40 41 42 43 50", rawRequest(method, target, ""))
		}
	}
	// Headers.
	for _, h := range []string{
		"Expect: 200-ok", "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13", "Upgrade: TLS/1.0\r\nConnection: Upgrade", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
		"Range: bytes=0-", "Range: bytes=18446744073709551615-", "Accept: " + strings.Repeat("a/b,", 5000), "Accept: */*;q=NaN", "Accept-Encoding: gzip", "If-None-Match: \"", "If-None-Match: " + strings.Repeat("\"1\",", 5000), "If-Match: *junk",
		"Last-Event-ID: -1", "X-HTTP-Method-Override: PUT", "X-Method-Override: DELETE", "X-Original-URL: /-/v1/status", "X-Rewrite-URL: /-/v1/status", "X-Forwarded-Host: evil.example", "Forwarded: for=evil;host=evil.example",
		"Idempotency-Key: x", "Trailer: Content-Length", "TE: trailers, deflate", "Connection: close, Content-Length", "Keep-Alive: timeout=99999", "Via: " + strings.Repeat("1.1 a,", 3000), "Cookie: " + hostileCanary, "Max-Forwards: 0", "Proxy-Connection: keep-alive",
	} {
		add("header", "40 417", rawRequest("GET", "/none", "", h))
	}
	for _, h := range []string{
		"Content-Encoding: gzip", "Content-Encoding: br", "Content-Encoding: identity, gzip", "Content-Range: bytes 0-1/2", "If-Unmodified-Since: Fri, 20 Nov 2026 12:00:00 GMT", "If-Match: W/\"1\"", "If-Match: \"1\", \"2\"", "If-Match: 1", "If-Match: \"1\"\r\nIf-None-Match: *",
		"If-None-Match: \"1\"", "Idempotency-Key:", "Idempotency-Key: \"unclosed", "Idempotency-Key: \xff", "Idempotency-Key: " + strings.Repeat("k", 256), "Idempotency-Key: a\r\nIdempotency-Key: b", "Content-Type: text", "Content-Type: text/plain\r\nContent-Type: text/html",
		"Content-Type: text/plain; a", "Content-Type: " + strings.Repeat("a", 256) + "/b", "Upgrade: websocket\r\nConnection: Upgrade", "Expect: 100-never",
	} {
		add("content", "40 41", rawRequest("PUT", "/hostile", "v", h))
	}
	// Names that are not this node's, as a page has that was rebound.
	for _, host := range []string{
		"evil.example", "127.0.0.1.nip.io", "localhost.evil.example", "evil.example:80", "127.0.0.1@evil.example", "evil.example/127.0.0.1", "0x7f000001", "2130706433", "127.1", "[::1", "[::1]evil", strings.Repeat("a", 300), "evil.example.", "_", "xn--e1afmkfd",
	} {
		add("host", "40 42", "PUT /hostile HTTP/1.1\r\nHost: "+host+"\r\nContent-Length: 1\r\n\r\nx")
		add("host", "40 42", "GET /-/v1/status HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
	}
	// What a page of another origin may send without asking.
	const txn = `{"then":[{"op":"put","key":"hostile","value":"v"}]}`
	for _, origin := range []string{"Origin: https://evil.example\r\nSec-Fetch-Site: cross-site", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: https://evil.example", "Origin: null", "Origin: http://127.0.0.1.nip.io"} {
		add("cross-origin", "403", rawRequest("POST", "/-/v1/members/66", `{"peerUrl":"http://127.0.0.1:46666"}`, origin, "Content-Type: text/plain"))
		add("cross-origin", "403", rawRequest("POST", "/66", "http://127.0.0.1:46666", origin, "Content-Type: text/plain"))
		add("cross-origin", "403", rawRequest("POST", "/-/v1/txn", txn, origin, "Content-Type: text/plain"))
		add("cross-origin", "403", rawRequest("POST", "/", "v", origin, "Content-Type: application/x-www-form-urlencoded"))
		add("cross-origin", "403", rawRequest("POST", "/-/v1/leader/2", "", origin))
		add("cross-origin", "403", rawRequest("PUT", "/hostile", "v", origin))
		add("cross-origin", "403", rawRequest("DELETE", "/-/v1/keys?prefix=h", "", origin))
		add("cross-origin", "204", rawRequest("OPTIONS", "/hostile", "", origin, "Access-Control-Request-Method: PUT"))
	}
	// JSON.
	for _, body := range []string{
		"", "{", "[", "null", "1", "\"a\"", "{}x", "{}{}", "\xef\xbb\xbf{}", "{\"then\":[]", "{'then':[]}", "{then:[]}", "{\"THEN\":[]}", "{\"then\":[],\"then\":[]}", "{\"then\":[],\"\\u0074hen\":[]}", "{\"then\":{}}", "{\"then\":[1]}", "{\"then\":[null]}", "{\"then\":[{\"OP\":\"put\"}]}",
		"{\"then\":[{\"op\":\"put\",\"key\":\"a\",\"key\":\"b\",\"value\":\"\"}]}", "{\"then\":[{\"op\":\"eval\",\"key\":\"a\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"\",\"value\":\"\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"a\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"a\",\"valueBase64\":\"!\"}]}",
		"{\"then\":[{\"op\":\"put\",\"key\":\"\\ud800\",\"value\":\"\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"\xff\",\"value\":\"\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"a\",\"value\":\"\",\"ttl\":\"-1s\"}]}", "{\"then\":[{\"op\":\"put\",\"key\":\"a\",\"value\":\"\",\"contentType\":\"a\\r\\nX: y\"}]}",
		"{\"if\":[{\"key\":\"a\",\"resourceVersion\":18446744073709551616}]}", "{\"if\":[{\"key\":\"a\",\"resourceVersion\":1e400}]}", "{\"if\":[{\"key\":\"a\",\"resourceVersion\":" + strings.Repeat("9", 100_000) + "}]}", "{\"then\":[" + strings.Repeat("{\"op\":\"get\",\"key\":\"a\"},", 128) + "{\"op\":\"get\",\"key\":\"a\"}]}",
		strings.Repeat("[", 100_000), strings.Repeat("{\"a\":", 100_000), "{\"then\":[" + strings.Repeat("null,", 200_000) + "null]}", "{\"__proto__\":{}}", "{\"then\":[{\"op\":\"put\",\"key\":\"" + strings.Repeat("k", 4097) + "\",\"value\":\"\"}]}", base64.StdEncoding.EncodeToString([]byte("{}")),
	} {
		add("json", "40", rawRequest("POST", "/-/v1/txn", body))
	}
	// Members, and calls for who looks after the node.
	for _, id := range []string{"0", "-1", "01", "1.5", "0x1", "18446744073709551616", "a", "%31%00", "1/../2"} {
		add("member", "40", rawRequest("POST", "/-/v1/members/"+id, `{"peerUrl":"http://127.0.0.1:1"}`))
		add("member", "40", rawRequest("DELETE", "/-/v1/members/"+id, ""))
		add("member", "40", rawRequest("POST", "/-/v1/leader/"+id, ""))
	}
	for _, u := range []string{"", "x", "127.0.0.1:1", "file:///etc/passwd", "gopher://127.0.0.1:1", "http://", "http://:1", "http://127.0.0.1", "http://127.0.0.1:0", "http://127.0.0.1:65536", "http://127.0.0.1:1/path", "http://127.0.0.1:1?q", "http://user:pass@127.0.0.1:1", "http://0.0.0.0:1", "http://[::]:1", "http://127.0.0.1:1#f", "http://127.0.0.1:1\\u0000"} {
		add("member", "40", rawRequest("POST", "/-/v1/members/77", `{"peerUrl":"`+u+`"}`))
	}
	for _, r := range []string{
		rawRequest("PUT", "/-/v1/members/77", `{"name":"n"}`), rawRequest("DELETE", "/-/v1/members/77", ""), rawRequest("POST", "/-/v1/members/77/promote", ""), rawRequest("POST", "/-/v1/members/77", `{"peerurl":"http://127.0.0.1:1"}`),
		rawRequest("PUT", "/-/v1/log-level", "loud"), rawRequest("POST", "/-/v1/leader/77", ""), rawRequest("POST", "/-/metrics", "x"), rawRequest("DELETE", "/-/v1/keys?prefix=", ""), rawRequest("DELETE", "/-/v1/keys", ""), rawRequest("PATCH", "/", "{"), rawRequest("PATCH", "/hostile", "{}"),
		rawRequest("POST", "/hostile", "v"), rawRequest("PUT", "/", "v"), rawRequest("MKCOL", "/hostile", ""), rawRequest("PROPFIND", "/", "<x/>"), rawRequest("DEBUG", "/", ""),
	} {
		add("node", "40", r)
	}
	// Bodies that are not what they were said to be.
	for _, r := range []string{
		"PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9223372036854775807\r\n\r\nx", "PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1099511627776\r\n\r\n", "PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n7fffffffffffffff\r\nx",
		"PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nshort", "PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsho", "PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nContent-Length: 1048577\r\n\r\n",
		"PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le", "PUT /hostile HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2097152\r\n\r\n" + strings.Repeat("x", 2<<20),
	} {
		add("body", "none 40 41", r)
	}
	return all
}

// hostileToPeers are messages to the port of members beside those, in the name of a
// cluster that is right or wrong.
func hostileToPeers(cluster string) (all []rawHostile) {
	add := func(raw string) { all = append(all, rawHostile{kind: "peer", raw: raw}) }
	for _, target := range []string{
		"/", "/raft/", "/raft/stream", "/raft/stream/", "/raft/stream/msgapp", "/raft/stream/msgapp/", "/raft/stream/msgapp/zz", "/raft/stream/message/1/2", "/raft/stream/other/2", "/raft/stream/../probing", "/raft/snapshot", "/raft/unknown", "/raft%2Fstream", "/RAFT", "//raft", "/-/peer/x", "/-/v1/status", "/-/metrics", "/members", "/version",
		"/raft/stream/msgapp/99", "/raft/stream/message/99", "/raft/stream/message/0", "/raft/stream/msgapp/ffffffffffffffff1",
	} {
		add(rawRequest("GET", target, "", "X-Etcd-Cluster-ID: "+cluster, "X-Server-From: 63", "X-Raft-To: 1", "X-Server-Version: 3.7.0", "X-Min-Cluster-Version: 3.0.0"))
		add(rawRequest("POST", target, "x", "X-Etcd-Cluster-ID: "+cluster, "X-Server-From: 63", "X-Server-Version: 3.7.0", "X-PeerURLs: http://evil.example:1"))
	}
	for _, h := range []string{"X-Etcd-Cluster-ID: 1", "X-Etcd-Cluster-ID:", "X-Etcd-Cluster-ID: " + strings.Repeat("f", 1000), "X-Server-From: zz\r\nX-Etcd-Cluster-ID: " + cluster, "X-Server-Version: 99.9.9\r\nX-Etcd-Cluster-ID: " + cluster, "X-Server-Version: 3.7\r\nX-Etcd-Cluster-ID: " + cluster} {
		add(rawRequest("GET", "/raft/stream/message/2", "", h))
		add(rawRequest("POST", "/raft", "x", h))
		add(rawRequest("POST", "/raft/snapshot", "12345678", h))
	}
	return all
}
