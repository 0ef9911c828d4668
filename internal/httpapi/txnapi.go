package httpapi

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"raftrv/internal/fault"
	"raftrv/internal/store"
)

// This file is the HTTP front of transactions: JSON in, JSON out.

// txnBodySizeMax bounds the JSON of a transaction, in bytes.
const txnBodySizeMax = 4 << 20

// txnBody is a transaction as a client writes it. The parts are decoded one by
// one, so that an error can say where it is.
type txnBody struct {
	If   []json.RawMessage
	Then []json.RawMessage
	Else []json.RawMessage
}

type comparisonBody struct {
	Key                    *string
	KeyBase64              *string
	ResourceVersion        *uint64
	CreatedResourceVersion *uint64
	Exists                 *bool
	Value                  *string
	ValueBase64            *string
}

type operationBody struct {
	Op          string
	Key         *string
	KeyBase64   *string
	Value       *string
	ValueBase64 *string
	TTL         *string
	ContentType *string
}

// postTxn carries out a transaction.
func (h *httpAPI) postTxn(w http.ResponseWriter, r request) error {
	body, err := h.readBody(w, r.Request, txnBodySizeMax)
	if err != nil {
		return err
	}
	t, err := parseTxn(body, h.ValueSizeMax, h.Store.Level())
	if err != nil {
		return err
	}
	res, err := h.propose(w, r, store.Command{Op: store.OpTxn, Value: t.Encode()}, body)
	if err != nil {
		return err
	}
	setResourceVersion(w.Header(), res.RV)
	if res.Status == store.StatusTooMany {
		return fault.ErrResultTooLarge.WithDetail("the values to get have more than %d bytes; get fewer in one transaction", h.Store.Rules().TxnResultMax)
	}
	ops := t.Branch(res.Status)
	if len(res.Ops) < len(ops) { // of a retry
		return fault.ErrResultNotKept.WithDetail("the transaction was carried out before, with succeeded: %v, at resource version %d; what it read was for who asked first, and is not kept",
			res.Status == store.StatusSucceeded, res.RV)
	}
	s := newStream(w, r, typeJSON)
	defer s.free()
	s.buf = append(s.buf, `{"succeeded":`...)
	s.buf = strconv.AppendBool(s.buf, res.Status == store.StatusSucceeded)
	s.buf = append(s.buf, `,"resourceVersion":`...)
	s.buf = strconv.AppendUint(s.buf, res.RV, 10)
	s.buf = append(s.buf, `,"results":[`...)
	for i := range res.Ops {
		if i > 0 {
			s.buf = append(s.buf, ',')
		}
		s.appendOpResult(&ops[i], &res.Ops[i], res.RV)
	}
	s.buf = append(s.buf, "]}\n"...)
	s.end()
	return nil
}

// appendOpResult appends what became of one operation.
func (s *stream) appendOpResult(c *store.Command, r *store.OpResult, rv uint64) {
	s.buf = append(s.buf, `{"op":"`...)
	s.buf = append(s.buf, opNames[c.Op]...)
	s.buf = append(s.buf, `",`...)
	s.buf = store.AppendBytesField(s.buf, "key", c.Key)
	switch c.Op {
	case store.OpPut:
		s.buf = append(s.buf, `,"resourceVersion":`...)
		s.buf = strconv.AppendUint(s.buf, rv, 10)
		s.buf = append(s.buf, `,"created":`...)
		s.buf = strconv.AppendBool(s.buf, r.Status == store.StatusCreated)
	case store.OpDelete:
		s.buf = append(s.buf, `,"deleted":`...)
		s.buf = strconv.AppendBool(s.buf, r.Status == store.StatusDeleted)
	default:
		s.buf = append(s.buf, `,"item":`...)
		if r.Status == store.StatusFound {
			s.appendItem(c.Key, r.Item, false)
		} else {
			s.buf = append(s.buf, "null"...)
		}
	}
	s.buf = append(s.buf, '}')
	s.flushLarge()
}

var opNames = map[store.Op]string{store.OpPut: "put", store.OpDelete: "delete", store.OpGet: "get"}

// parseTxn reads a transaction.
func parseTxn(body string, valueSizeMax, level int) (t store.Txn, err error) {
	var b txnBody
	if err := decodeBody(body, jsonField{"if", &b.If}, jsonField{"then", &b.Then}, jsonField{"else", &b.Else}); err != nil {
		return store.Txn{}, err
	}
	for _, list := range []struct {
		name  string
		parts []json.RawMessage
	}{{"if", b.If}, {"then", b.Then}, {"else", b.Else}} {
		if len(list.parts) > store.TxnOpsMax {
			return store.Txn{}, fault.ErrInvalid.WithDetail("%s: %d entries; at most %d are taken", list.name, len(list.parts), store.TxnOpsMax)
		}
	}
	p := txnParser{valueSizeMax: valueSizeMax, level: level}
	for i, part := range b.If {
		t.Compare = append(t.Compare, p.comparison(fmt.Sprintf("if[%d]", i), part))
	}
	t.Then = p.operations("then", b.Then)
	t.Otherwise = p.operations("else", b.Else)
	return t, p.err
}

// txnParser keeps the first error.
type txnParser struct {
	valueSizeMax int
	level        int // of the cluster
	err          error
}

func (p *txnParser) fail(place, format string, args ...any) {
	if p.err == nil {
		p.err = fault.ErrInvalid.WithDetail("%s: %s", place, fmt.Sprintf(format, args...))
	}
}

func (p *txnParser) decode(place string, part json.RawMessage, fields ...jsonField) {
	if err := decodeObject(place, part, fields...); err != nil && p.err == nil {
		p.err = err
	}
}

func (p *txnParser) comparison(place string, part json.RawMessage) store.Comparison {
	var b comparisonBody
	p.decode(place, part, jsonField{"key", &b.Key}, jsonField{"keyBase64", &b.KeyBase64}, jsonField{"resourceVersion", &b.ResourceVersion},
		jsonField{"createdResourceVersion", &b.CreatedResourceVersion}, jsonField{"exists", &b.Exists}, jsonField{"value", &b.Value}, jsonField{"valueBase64", &b.ValueBase64})
	c := store.Comparison{Key: p.key(place, b.Key, b.KeyBase64)}
	n := 0
	if b.ResourceVersion != nil {
		c.Kind, c.RV = store.ByVersion, *b.ResourceVersion
		n++
	}
	if b.CreatedResourceVersion != nil {
		c.Kind, c.RV = store.ByCreated, *b.CreatedResourceVersion
		n++
	}
	if b.Exists != nil {
		c.Kind = store.ByAbsent
		if *b.Exists {
			c.Kind = store.ByExists
		}
		n++
	}
	if b.Value != nil || b.ValueBase64 != nil {
		c.Kind, c.Value = store.ByValue, p.value(place, b.Value, b.ValueBase64)
		n++
	}
	if n != 1 {
		p.fail(place, "exactly one of resourceVersion, createdResourceVersion, exists, value and valueBase64 is needed")
	}
	return c
}

// operations reads the operations of one branch.
func (p *txnParser) operations(branch string, parts []json.RawMessage) []store.Command {
	var ops []store.Command
	written := map[string]int{} // key: which operation writes it
	for i, part := range parts {
		place := fmt.Sprintf("%s[%d]", branch, i)
		c := p.operation(place, part)
		if c.Op != store.OpGet {
			if first, twice := written[c.Key]; twice {
				p.fail(place+".key", "%s[%d] writes this key already", branch, first)
			}
			written[c.Key] = i
		}
		ops = append(ops, c)
		if p.err != nil {
			return nil
		}
	}
	return ops
}

func (p *txnParser) operation(place string, part json.RawMessage) store.Command {
	var b operationBody
	p.decode(place, part, jsonField{"op", &b.Op}, jsonField{"key", &b.Key}, jsonField{"keyBase64", &b.KeyBase64},
		jsonField{"value", &b.Value}, jsonField{"valueBase64", &b.ValueBase64}, jsonField{"ttl", &b.TTL}, jsonField{"contentType", &b.ContentType})
	c := store.Command{Key: p.key(place, b.Key, b.KeyBase64)}
	hasValue := b.Value != nil || b.ValueBase64 != nil
	switch b.Op {
	case "put":
		c.Op = store.OpPut
		if !hasValue {
			p.fail(place+".value", "a put needs value or valueBase64")
		}
		c.Value = p.value(place, b.Value, b.ValueBase64)
		c.SetTTL(p.ttl(place+".ttl", b.TTL), p.level)
		if b.ContentType != nil {
			if !isMediaType(*b.ContentType) {
				p.fail(place+".contentType", "must be a media type such as text/plain; charset=utf-8, of at most %d bytes", store.ContentTypeSizeMax)
			}
			setContentType(&c, *b.ContentType, p.level)
		}
		return c
	case "delete":
		c.Op = store.OpDelete
	case "get":
		c.Op = store.OpGet
	default:
		p.fail(place+".op", "must be put, delete or get, not %q", b.Op)
	}
	if hasValue {
		p.fail(place+".value", "only a put has a value")
	}
	if b.TTL != nil {
		p.fail(place+".ttl", "only a put has a ttl")
	}
	if b.ContentType != nil {
		p.fail(place+".contentType", "only a put has a contentType")
	}
	return c
}

func (p *txnParser) key(place string, text, encoded *string) string {
	key := p.bytes(place+".key", text, encoded)
	if len(key) == 0 || len(key) > store.KeySizeMax {
		p.fail(place+".key", "has %d bytes; it must have 1 to %d", len(key), store.KeySizeMax)
	}
	return key
}

// bytes reads a field that has one name for text and another for base64.
func (p *txnParser) bytes(place string, text, encoded *string) string {
	s := ""
	switch {
	case text != nil && encoded != nil:
		p.fail(place, "is given twice, as text and as base64")
	case text != nil:
		s = *text
	case encoded != nil:
		b, err := base64.StdEncoding.DecodeString(*encoded)
		if err != nil {
			p.fail(place+"Base64", "is not base64")
		}
		s = string(b)
	}
	return s
}

func (p *txnParser) value(place string, text, encoded *string) string {
	s := p.bytes(place+".value", text, encoded)
	if len(s) > p.valueSizeMax && p.err == nil {
		p.err = fault.ErrTooLarge.WithDetail("%s.value: has %d bytes; at most %d are taken", place, len(s), p.valueSizeMax)
	}
	return s
}

func (p *txnParser) ttl(place string, text *string) time.Duration {
	if text == nil {
		return 0
	}
	ttl, err := parseTTL(*text)
	if err != nil {
		p.fail(place, "%s", errorDetail(err))
	}
	return ttl
}

func errorDetail(err error) string {
	if e, ok := errors.AsType[*fault.Error](err); ok {
		return e.Detail
	}
	return err.Error()
}

// hasLoneSurrogate says whether JSON has an escape that is half a character.
// Decoding it would silently give another one.
func hasLoneSurrogate(s string) bool {
	for {
		i := strings.IndexByte(s, '\\')
		if i < 0 || i+1 == len(s) {
			return false
		}
		s = s[i+1:]
		first, rest := unicodeEscape(s)
		switch {
		case 0xdc00 <= first && first < 0xe000:
			return true
		case 0xd800 <= first && first < 0xdc00:
			if !strings.HasPrefix(rest, `\`) {
				return true
			}
			if second, _ := unicodeEscape(rest[1:]); second < 0xdc00 || second >= 0xe000 {
				return true
			}
			rest = rest[6:]
		}
		s = rest
	}
}

// unicodeEscape returns the number in what follows a backslash, 0 if it is
// another kind of escape, and what follows it.
func unicodeEscape(s string) (n uint64, rest string) {
	if s == "" {
		return 0, ""
	}
	if s[0] != 'u' || len(s) < 5 {
		return 0, s[1:]
	}
	n, err := strconv.ParseUint(s[1:5], 16, 16)
	if err != nil {
		return 0, s[1:] // malformed, as the decoder will say
	}
	return n, s[5:]
}
