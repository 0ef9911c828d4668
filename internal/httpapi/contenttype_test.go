package httpapi

import (
	"fmt"
	"strings"
	"testing"

	"raftrv/internal/store"
)

// TestHTTP_ContentType: the type of a value is kept with it, and given back where a
// browser would only show what has it.
func TestHTTP_ContentType(t *testing.T) {
	const none = "application/octet-stream"
	f := newFront(t)
	f.store.State.SetLevel(3)
	for _, tt := range []struct{ sent, kept, served string }{
		{"application/json", "application/json", "application/json"},
		{"text/plain; charset=utf-8", "text/plain; charset=utf-8", "text/plain; charset=utf-8"},
		{"  TEXT/Plain ", "TEXT/Plain", "TEXT/Plain"},
		{"image/png", "image/png", "image/png"},
		{"application/octet-stream", none, none},
		{"application/x-www-form-urlencoded", "", none}, // what curl says of any body
		{"", "", none},
		// What a browser may run, or hand to something that does, or what nobody knows.
		{"text/html", "text/html", none},
		{"text/html; charset=utf-8", "text/html; charset=utf-8", none},
		{"application/xhtml+xml", "application/xhtml+xml", none},
		{"image/svg+xml", "image/svg+xml", none},
		{"text/xml", "text/xml", none},
		{"application/xml", "application/xml", none},
		{"text/javascript", "text/javascript", none},
		{"application/javascript", "application/javascript", none},
		{"text/css", "text/css", none},
		{"application/pdf", "application/pdf", none},
		{"application/wasm", "application/wasm", none},
		{"multipart/x-mixed-replace; boundary=b", "multipart/x-mixed-replace; boundary=b", none},
		{"message/rfc822", "message/rfc822", none},
		{"text/cache-manifest", "text/cache-manifest", none},
		{"application/problem+json", "application/problem+json", none},
		{"new/kind", "new/kind", none},
	} {
		a := f.do("PUT", "/k", "<b>", "Content-Type: "+tt.sent)
		if a.Code/100 != 2 {
			t.Errorf("%q: %d %s", tt.sent, a.Code, a.Body)
			continue
		}
		for _, method := range []string{"GET", "HEAD"} {
			a = f.do(method, "/k", "")
			a.Want(t, 200)
			a.WantHeader(t, "Content-Type", tt.served)
			a.WantHeader(t, "X-Content-Type-Options", "nosniff")
			a.WantHeader(t, "Content-Security-Policy", contentSecurityPolicy)
		}
		field := ""
		if tt.kept != "" {
			field = fmt.Sprintf(`,"contentType":%q`, tt.kept)
		}
		for _, target := range []string{"/-/v1/keys/k", "/-/v1/keys", "/-/v1/watch?initial=true&timeout=1ms"} {
			if a := f.do("GET", target, ""); !strings.Contains(a.Body, `"createdResourceVersion":1`+field+`}`) && !strings.Contains(a.Body, `"createdResourceVersion":1`+field+`,"prev`) {
				t.Errorf("%q: %s: %s", tt.sent, target, a.Body)
			}
		}
	}
	for _, bad := range [][]string{
		{"text"}, {"/"}, {"text/"}, {"/plain"}, {"text/plain; charset"}, {"text/plain; charset=\"utf-8"}, {"text/plain, text/html"}, {"text/plain; a=b; a=c"},
		{"text plain/x"}, {"text/pl\x00ain"}, {"text/plain; name=\"\xe4\""}, {"text/" + strings.Repeat("x", store.ContentTypeSizeMax)}, {"text/plain", "text/html"}, {"text/plain", "text/plain"},
	} {
		var headers []string
		for _, v := range bad {
			headers = append(headers, "Content-Type: "+v)
		}
		for method, target := range map[string]string{"PUT": "/bad", "POST": "/", "PATCH": "/"} {
			if a := f.do(method, target, "1", headers...); a.Code != 400 {
				t.Errorf("%s %q: %d %s", method, bad, a.Code, a.Body)
			}
		}
	}
	// A write without a type is one of a value without a type, and no other version than before.
	f.do("PUT", "/k", "1", "Content-Type: text/csv").Want(t, 204)
	rv := f.store.Version()
	a := f.do("PUT", "/k", "2")
	a.WantHeader(t, "ETag", fmt.Sprintf("%q", fmt.Sprint(rv+1)))
	f.do("GET", "/k", "").WantHeader(t, "Content-Type", none)
	// The other ways to write.
	created := f.do("POST", "/", "{}", "Content-Type: application/json")
	f.do("GET", created.Header.Get("Location"), "").WantHeader(t, "Content-Type", "application/json")
	created = f.do("PATCH", "/", "{}", "Content-Type: application/json")
	f.do("GET", created.Header.Get("Location"), "").WantHeader(t, "Content-Type", "application/json")
	a = f.do("POST", "/-/v1/txn", `{"then":[{"op":"put","key":"t","value":"x","contentType":"text/csv"},{"op":"get","key":"t"}]}`)
	if !strings.Contains(a.Body, `"contentType":"text/csv"`) {
		t.Error(a.Body)
	}
	f.do("GET", "/t", "").WantHeader(t, "Content-Type", "text/csv")
	f.do("POST", "/-/v1/txn", `{"then":[{"op":"put","key":"t","value":"x","contentType":"csv"}]}`).Want(t, 400)
	f.do("POST", "/-/v1/txn", `{"then":[{"op":"delete","key":"t","contentType":"text/csv"}]}`).Want(t, 400)
	// It is part of what a request is.
	f.do("PUT", "/once", "x", "Idempotency-Key: once", "Content-Type: text/csv").Want(t, 201)
	f.do("PUT", "/once", "x", "Idempotency-Key: once", "Content-Type: text/csv").Want(t, 201)
	f.do("PUT", "/once", "x", "Idempotency-Key: once", "Content-Type: text/plain").Want(t, 422)
}

// TestHTTP_ContentTypeBefore: while a member does not know content types nobody keeps them.
func TestHTTP_ContentTypeBefore(t *testing.T) {
	f := newFront(t)
	f.store.State.SetLevel(2)
	f.do("PUT", "/k", "1", "Content-Type: application/json").Want(t, 201)
	f.do("POST", "/-/v1/txn", `{"then":[{"op":"put","key":"t","value":"x","contentType":"text/csv"}]}`).Want(t, 200)
	for _, key := range []string{"k", "t"} {
		f.do("GET", "/"+key, "").WantHeader(t, "Content-Type", "application/octet-stream")
	}
	for _, c := range []store.Command{{Op: store.OpPut, Key: "k", ContentType: "a/b"}, {Op: store.OpPut, Key: "k", Retry: store.RetryID{Key: "r", Client: 1}}} {
		if err := store.CheckCommands(c.AppendTo(nil), 2); err == nil || !strings.Contains(err.Error(), "this needs 3") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	header := store.Command{Op: store.OpPut, Key: "k", ContentType: "a/b\r\nSet-Cookie: x=y"}
	if err := store.CheckCommands(header.AppendTo(nil), 3); err == nil {
		t.Error("a member may propose any header")
	}
}
