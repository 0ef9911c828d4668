package httpapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

func TestHTTP_Txn(t *testing.T) {
	f := newFront(t)
	f.put("a", "1")    // 1
	f.put("b", "2")    // 2
	f.put("a", "1b")   // 3
	f.put("\xff", "3") // 4
	for _, tt := range []struct{ body, want string }{
		{`{}`, `{"succeeded":true,"resourceVersion":4,"results":[]}`},
		{` {"if":null,"then":[],"else":[]} `, `{"succeeded":true,"resourceVersion":4,"results":[]}`},
		{`{"then":[{"op":"get","key":"a"},{"op":"get","key":"none"},{"op":"get","keyBase64":"/w=="}]}`,
			`{"succeeded":true,"resourceVersion":4,"results":[{"op":"get","key":"a","item":{"key":"a","value":"1b","resourceVersion":3,"createdResourceVersion":1}},` +
				`{"op":"get","key":"none","item":null},{"op":"get","keyBase64":"/w==","item":{"keyBase64":"/w==","value":"3","resourceVersion":4,"createdResourceVersion":4}}]}`},
		// Each comparison, first when it holds, then when it does not.
		{`{"if":[{"key":"a","resourceVersion":3},{"key":"a","createdResourceVersion":1},{"key":"a","exists":true},{"key":"a","value":"1b"},{"keyBase64":"YQ==","valueBase64":"MWI="},` +
			`{"key":"n","exists":false},{"key":"n","resourceVersion":0},{"key":"n","createdResourceVersion":0}]}`, `{"succeeded":true,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"a","resourceVersion":1}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"a","createdResourceVersion":3}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"a","exists":false}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"a","value":"1"}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"n","value":""}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"n","exists":true}]}`, `{"succeeded":false,"resourceVersion":4,"results":[]}`},
		{`{"if":[{"key":"b","exists":true},{"key":"n","resourceVersion":1}],"then":[{"op":"put","key":"x","value":""}],"else":[{"op":"get","key":"b"}]}`,
			`{"succeeded":false,"resourceVersion":4,"results":[{"op":"get","key":"b","item":{"key":"b","value":"2","resourceVersion":2,"createdResourceVersion":2}}]}`},
		// All of one transaction has one version, and each operation sees those before it.
		{`{"if":[{"key":"b","resourceVersion":2}],"then":[{"op":"get","key":"b"},{"op":"put","key":"b","value":"B"},{"op":"get","key":"b"},{"op":"put","key":"c","valueBase64":"/w=="},` +
			`{"op":"delete","key":"a"},{"op":"get","key":"a"},{"op":"delete","key":"none"}],"else":[{"op":"put","key":"x","value":""}]}`,
			`{"succeeded":true,"resourceVersion":5,"results":[{"op":"get","key":"b","item":{"key":"b","value":"2","resourceVersion":2,"createdResourceVersion":2}},` +
				`{"op":"put","key":"b","resourceVersion":5,"created":false},{"op":"get","key":"b","item":{"key":"b","value":"B","resourceVersion":5,"createdResourceVersion":2}},` +
				`{"op":"put","key":"c","resourceVersion":5,"created":true},{"op":"delete","key":"a","deleted":true},{"op":"get","key":"a","item":null},{"op":"delete","key":"none","deleted":false}]}`},
		{`{"if":[{"key":"b","resourceVersion":2}],"then":[{"op":"put","key":"x","value":""}],"else":[{"op":"delete","key":"c"}]}`,
			`{"succeeded":false,"resourceVersion":6,"results":[{"op":"delete","key":"c","deleted":true}]}`},
		// Nothing changed: no version.
		{`{"then":[{"op":"delete","key":"none"}]}`, `{"succeeded":true,"resourceVersion":6,"results":[{"op":"delete","key":"none","deleted":false}]}`},
		{`{"then":[{"op":"put","key":"\ud83d\ude00\u0000/\\","value":"\u00e9"},{"op":"get","key":"😀\u0000/\\"}]}`,
			`{"succeeded":true,"resourceVersion":7,"results":[{"op":"put","key":"😀\u0000/\\","resourceVersion":7,"created":true},` +
				`{"op":"get","key":"😀\u0000/\\","item":{"key":"😀\u0000/\\","value":"é","resourceVersion":7,"createdResourceVersion":7}}]}`},
	} {
		a := f.do("POST", "/-/v1/txn", tt.body)
		a.Want(t, 200)
		a.WantHeader(t, "Content-Type", "application/json")
		a.WantHeader(t, "Resource-Version", fmt.Sprint(f.store.Version()))
		if a.Body != tt.want+"\n" {
			t.Errorf("%s\n%s\nwant\n%s", tt.body, a.Body, tt.want)
		}
	}
}

func TestHTTP_TxnErrors(t *testing.T) {
	get := `{"op":"get","key":"a"}`
	compare := `{"key":"a","exists":true}`
	f := newFront(t)
	for _, tt := range []struct {
		body   string
		code   int
		detail string
	}{
		{``, 400, "the body: unexpected EOF"},
		{`{`, 400, "the body: unexpected EOF"},
		{`{}x`, 400, "the body: something follows"},
		{`{}{}`, 400, "the body: something follows"},
		{`null x`, 400, "the body: must be a JSON object"},
		{`null`, 400, "the body: must be a JSON object"},
		{`{} {}`, 400, "the body: something follows the JSON object"},
		{`{"THEN":[]}`, 400, `the body: unknown field "THEN"; there are if, then, else`},
		{`{"then":[],"then":[]}`, 400, `the body: field "then" is given twice`},
		{`{"then":[],"\u0074hen":[]}`, 400, `the body: field "then" is given twice`},
		{`{"then":[{"OP":"get","key":"a"}]}`, 400, `then[0]: unknown field "OP"`},
		{`{"then":[{"op":"get","key":"a","Key":"b"}]}`, 400, `then[0]: unknown field "Key"`},
		{`{"then":[{"op":"get","key":"a","key":"b"}]}`, 400, `then[0]: field "key" is given twice`},
		{`{"if":[{"key":"a","exists":true,"exists":false}]}`, 400, `if[0]: field "exists" is given twice`},
		{`{"then":[{"op":"put","key":{"a":1},"value":""}]}`, 400, "then[0].key: a JSON object is no string"},
		{`[]`, 400, "the body: must be a JSON object"},
		{`{"when":[]}`, 400, `the body: unknown field "when"`},
		{`{"if":{}}`, 400, "if: a JSON object is no"},
		{`{"then":"x"}`, 400, "then: a JSON string is no"},
		{`{"if":[` + compare + `,{}]}`, 400, "if[1].key: has 0 bytes; it must have 1 to 4096"},
		{`{"if":[1]}`, 400, "if[0]: must be a JSON object"},
		{`{"if":[null]}`, 400, "if[0]: must be a JSON object"},
		{`{"if":[{"key":"a"}]}`, 400, "if[0]: exactly one of resourceVersion, "},
		{`{"if":[{"key":"a","exists":true,"value":"1"}]}`, 400, "if[0]: exactly one of"},
		{`{"if":[{"key":"a","value":"1","valueBase64":"MQ=="}]}`, 400, "if[0].value: is given twice"},
		{`{"if":[{"key":"a","keyBase64":"YQ==","exists":true}]}`, 400, "if[0].key: is given twice"},
		{`{"if":[{"key":"a","version":1}]}`, 400, `if[0]: unknown field "version"`},
		{`{"if":[{"key":"a","resourceVersion":"1"}]}`, 400, "if[0].resourceVersion: a JSON string is no whole number"},
		{`{"if":[{"key":"a","resourceVersion":-1}]}`, 400, "if[0].resourceVersion: a JSON number -1 is no whole number"},
		{`{"if":[{"key":"a","resourceVersion":1.5}]}`, 400, "if[0].resourceVersion: a JSON number 1.5 is no whole number"},
		{`{"if":[{"key":"a","exists":1}]}`, 400, "if[0].exists: a JSON number is no true or false"},
		{`{"if":[{"key":"` + strings.Repeat("k", store.KeySizeMax+1) + `","exists":true}]}`, 400, "if[0].key: has 4097 bytes"},
		{`{"then":[` + get + `,` + get + `,` + get + `,{"op":"get","key":""}]}`, 400, "then[3].key: has 0 bytes; it must have 1 to 4096"},
		{`{"else":[{"op":"get"}]}`, 400, "else[0].key: has 0 bytes"},
		{`{"then":[{"key":"a"}]}`, 400, `then[0].op: must be put, delete or get, not ""`},
		{`{"then":[{"op":"Put","key":"a","value":""}]}`, 400, `then[0].op: must be put, delete or get, not "Put"`},
		{`{"then":[{"op":"txn","key":"a"}]}`, 400, `then[0].op: must be`},
		{`{"then":[{"op":"put","key":"a"}]}`, 400, "then[0].value: a put needs value or valueBase64"},
		{`{"then":[{"op":"get","key":"a","value":"1"}]}`, 400, "then[0].value: only a put has a value"},
		{`{"then":[{"op":"delete","key":"a","valueBase64":"MQ=="}]}`, 400, "then[0].value: only a put has a value"},
		{`{"then":[{"op":"delete","key":"a","ttl":"3s"}]}`, 400, "then[0].ttl: only a put has a ttl"},
		{`{"then":[{"op":"put","key":"a","value":"","ttl":"3"}]}`, 400, "then[0].ttl: ttl must be a duration"},
		{`{"then":[{"op":"put","key":"a","value":"","ttl":5}]}`, 400, "then[0].ttl: a JSON number is no string"},
		{`{"then":[{"op":"put","key":"a","valueBase64":"?"}]}`, 400, "then[0].valueBase64: is not base64"},
		{`{"then":[{"op":"get","keyBase64":"YQ"}]}`, 400, "then[0].keyBase64: is not base64"},
		{`{"then":[{"op":"get","key":"a","else":[]}]}`, 400, `then[0]: unknown field "else"`},
		{`{"then":[{"op":"put","key":"a","value":"1"},` + get + `,{"op":"delete","key":"a"}]}`, 400, "then[2].key: then[0] writes this key already"},
		{`{"else":[{"op":"delete","key":"a"},{"op":"put","keyBase64":"YQ==","value":"1"}]}`, 400, "else[1].key: else[0] writes this key already"},
		{`{"if":[` + strings.Repeat(compare+",", store.TxnOpsMax) + compare + `]}`, 400, "if: 129 entries; at most 128 are taken"},
		{`{"then":[` + strings.Repeat(get+",", store.TxnOpsMax) + get + `]}`, 400, "then: 129 entries; at most 128 are taken"},
		{`{"then":[` + strings.Repeat("{},", 100_000) + `{}]}`, 400, "then: 100001 entries"},
		{`{"then":[{"op":"get","key":"` + "\xff" + `"}]}`, 400, "the body is not Unicode text"},
		{`{"then":[{"op":"get","key":"\ud800"}]}`, 400, "the body is not Unicode text"},
		{`{"then":[{"op":"get","key":"\ud800\u0041"}]}`, 400, "the body is not Unicode text"},
		{`{"then":[{"op":"get","key":"\\\udc00"}]}`, 400, "the body is not Unicode text"},
		{strings.Repeat("[", 100_000), 400, "the body"},
		{`{"then":[{"op":"put","key":"a","value":"` + strings.Repeat("v", testValueSizeMax+1) + `"}]}`, 413, "then[0].value: has 102401 bytes; at most 102400 are taken"},
		{strings.Repeat(" ", txnBodySizeMax+1), 413, "at most 4194304 bytes are taken"},
	} {
		a := f.do("POST", "/-/v1/txn", tt.body)
		if a.Code != tt.code {
			t.Errorf("%.100s: %d %s", tt.body, a.Code, a.Body)
			continue
		}
		p := mustProblem(t, a)
		if want := map[int]string{400: "invalid-request", 413: "value-too-large"}[tt.code]; p.Code != want || p.Outcome != fault.NotApplied || !strings.HasPrefix(p.Detail, tt.detail) {
			t.Errorf("%.100s: %+v, want %s", tt.body, p, tt.detail)
		}
	}
	if rv := f.store.Version(); rv != 0 {
		t.Errorf("%d writes got through", rv)
	}
	// As many as there may be.
	body := `{"if":[` + strings.Repeat(compare+",", store.TxnOpsMax-1) + compare + `],"then":[` + strings.Repeat(get+",", store.TxnOpsMax-1) + get + `]}`
	f.do("POST", "/-/v1/txn", body).Want(t, 200)
}

// The limit of values is none of keys.
func TestTxn_SmallValues(t *testing.T) {
	if _, err := parseTxn(`{"then":[{"op":"put","key":"longer than a value","value":"12345"}]}`, 5, store.LevelNewest); err != nil {
		t.Error(err)
	}
	if _, err := parseTxn(`{"if":[{"key":"k","valueBase64":"MTIzNDU2"}]}`, 5, store.LevelNewest); !errors.Is(err, fault.ErrTooLarge) {
		t.Error(err)
	}
}

// What a transaction returns is bounded, wherever the values come from.
func TestHTTP_TxnResultTooLarge(t *testing.T) {
	f := newFront(t)
	f.put("large", strings.Repeat("v", testValueSizeMax))
	gets := strings.Repeat(`,{"op":"get","key":"large"}`, store.TxnResultMax/testValueSizeMax)
	for _, body := range []string{
		`{"then":[{"op":"put","key":"x","value":""},{"op":"get","key":"large"}` + gets + `]}`,
		`{"then":[{"op":"put","key":"new","value":"` + strings.Repeat("v", testValueSizeMax) + `"}` + strings.ReplaceAll(gets, "large", "new") + `,{"op":"get","key":"new"}]}`,
	} {
		a := f.do("POST", "/-/v1/txn", body)
		a.Want(t, 413)
		if p := mustProblem(t, a); p.Code != "result-too-large" || p.Outcome != fault.NotApplied || !strings.Contains(p.Detail, "4194304") {
			t.Errorf("%+v", p)
		}
	}
	if rv := f.store.Version(); rv != 1 {
		t.Errorf("version %d", rv)
	}
	a := f.do("POST", "/-/v1/txn", `{"then":[{"op":"put","key":"large","value":""},{"op":"get","key":"large"}`+gets+`]}`)
	a.Want(t, 200)
	a = f.do("POST", "/-/v1/txn", `{"then":[{"op":"put","key":"large","value":"`+strings.Repeat("v", testValueSizeMax)+`"}`+gets+`]}`)
	a.Want(t, 200)
	if len(a.Body) < store.TxnResultMax-testValueSizeMax {
		t.Errorf("%d bytes", len(a.Body))
	}
}

// What is taken as a transaction means what it says, to any JSON decoder.
func FuzzTxnJSON(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"if":[{"key":"a","resourceVersion":1}],"then":[{"op":"put","key":"a","value":"1","ttl":"30s"},{"op":"get","key":"b"}],"else":[{"op":"delete","keyBase64":"/w=="}]}`,
		`{"then":[{"op":"get","key":"\ud83d\ude00"}]}`, `{"then":[{"op":"get","key":"\ud83d"}]}`, `{"then":[{"op":"get","key":"\`, `{"if":[{"Key":"a","exists":true}]}`, `{"if":[{"key":"a","exists":true}]} `,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		tx, err := parseTxn(body, 100, store.LevelNewest)
		if err != nil {
			if !errors.Is(err, fault.ErrInvalid) && !errors.Is(err, fault.ErrTooLarge) {
				t.Fatal(err)
			}
			return
		}
		if !json.Valid([]byte(body)) {
			t.Fatalf("%q was taken", body)
		}
		if len(tx.Compare) > store.TxnOpsMax || len(tx.Then) > store.TxnOpsMax || len(tx.Otherwise) > store.TxnOpsMax {
			t.Fatalf("%q: %+v", body, tx)
		}
		for _, c := range append(tx.Then, tx.Otherwise...) {
			if len(c.Key) == 0 || len(c.Key) > store.KeySizeMax || len(c.Value) > 100 || c.Op != store.OpPut && c.Op != store.OpGet && c.Op != store.OpDelete {
				t.Fatalf("%q: %+v", body, c)
			}
			// A character that JSON cannot hold becomes U+FFFD, and with it the key
			// another one.
			if strings.Contains(c.Key, "\ufffd") && !strings.Contains(body, "\ufffd") && !strings.Contains(strings.ToLower(body), `\ufffd`) && !strings.Contains(body, "Base64") {
				t.Fatalf("%q: %q", body, c.Key)
			}
		}
		decoded, err := store.DecodeTxn(tx.Encode())
		if err != nil || fmt.Sprint(decoded) != fmt.Sprint(tx) {
			t.Fatalf("%q: %+v, comes back as %+v, %v", body, tx, decoded, err)
		}
	})
}

func TestHasLoneSurrogate(t *testing.T) {
	for text, want := range map[string]bool{
		`ud800`: false, `\\ud800`: false, `\n\\ud800`: false, `\`: false, `\u`: false, `\ud80`: false, `\ud7ff`: false, `\ue000`: false,
		`\ud800`: true, `\ud800x`: true, `\ud800\`: true, `\ud800\n`: true, `\ud800\udbff`: true, `\ud800\ue000`: true,
		`\udc00`: true, `\udfff`: true, `\n\udc00`: true, `\udbff`: true,
		`\ud800\udc00`: false, `\udbff\udfff`: false, `\uD800\uDFFF`: false,
		`\ud800\udc00\ud800`: true, `\ud800\udc00\udc00`: true, `\ud800\udc00ud800`: false,
	} {
		if got := hasLoneSurrogate(text); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
