package store

import (
	"encoding/base64"
	"strconv"
	"time"
	"unicode/utf8"
)

// This file is the JSON form of an item, the same in lists, transactions and
// watch events:
//
//	{"key":"a","value":"1","resourceVersion":7,"createdResourceVersion":3,"expiresAt":"2026-01-02T15:04:05.678Z","contentType":"text/plain"}
//
// Keys and values are any bytes. What is not UTF-8 has a field of another name,
// keyBase64 or valueBase64, so that no byte is lost and the usual case reads
// well. The functions append, because a list has a million of them.

// expiresAtLayout is RFC 3339 with milliseconds, which is what a deadline has.
const expiresAtLayout = "2006-01-02T15:04:05.000Z"

// AppendItemJSON appends an item, without its value if keysOnly.
func AppendItemJSON(buf []byte, key string, it Item, keysOnly bool) []byte {
	buf = append(buf, '{')
	buf = AppendBytesField(buf, "key", key)
	if !keysOnly {
		buf = append(buf, ',')
		buf = AppendBytesField(buf, "value", it.Value)
	}
	return AppendItemEnd(buf, it)
}

// AppendItemStart appends what comes before the text of a value.
func AppendItemStart(buf []byte, key string, isText bool) []byte {
	buf = AppendBytesField(append(buf, '{'), "key", key)
	if isText {
		return append(buf, `,"value":"`...)
	}
	return append(buf, `,"valueBase64":"`...)
}

// AppendPiece appends a piece of a value. The size of all but the last can be divided
// by three.
func AppendPiece(buf []byte, piece string, isText bool) []byte {
	if isText {
		return appendJSONText(buf, piece)
	}
	return base64.StdEncoding.AppendEncode(buf, []byte(piece))
}

// AppendItemEnd appends what comes after the value.
func AppendItemEnd(buf []byte, it Item) []byte {
	buf = append(buf, `,"resourceVersion":`...)
	buf = strconv.AppendUint(buf, it.RV, 10)
	buf = append(buf, `,"createdResourceVersion":`...)
	buf = strconv.AppendUint(buf, it.Created, 10)
	if it.Expires != 0 {
		buf = append(buf, `,"expiresAt":"`...)
		buf = time.UnixMilli(it.Expires).UTC().AppendFormat(buf, expiresAtLayout)
		buf = append(buf, '"')
	}
	if it.ContentType != "" {
		buf = append(buf, ',')
		buf = AppendBytesField(buf, "contentType", it.ContentType)
	}
	return append(buf, '}')
}

// AppendBytesField appends "name":"text", or "nameBase64":"..." if the bytes are
// not text.
func AppendBytesField(buf []byte, name, s string) []byte {
	buf = append(buf, '"')
	buf = append(buf, name...)
	if !utf8.ValidString(s) {
		buf = append(buf, `Base64":"`...)
		buf = base64.StdEncoding.AppendEncode(buf, []byte(s))
		return append(buf, '"')
	}
	buf = append(buf, `":`...)
	return AppendJSONString(buf, s)
}

// AppendJSONString appends valid UTF-8 as a JSON string.
func AppendJSONString(buf []byte, s string) []byte {
	return append(appendJSONText(append(buf, '"'), s), '"')
}

// appendJSONText appends what is between the quotes.
func appendJSONText(buf []byte, s string) []byte {
	start := 0 // s[start:i] needs no escape
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		buf = append(buf, s[start:i]...)
		start = i + 1
		switch c {
		case '"', '\\':
			buf = append(buf, '\\', c)
		case '\n':
			buf = append(buf, '\\', 'n')
		case '\r':
			buf = append(buf, '\\', 'r')
		case '\t':
			buf = append(buf, '\\', 't')
		default:
			const digits = "0123456789abcdef"
			buf = append(buf, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		}
	}
	return append(buf, s[start:]...)
}

// ItemFixedSize is the most that an item takes in JSON beside its key and value,
// with a comma.
const ItemFixedSize = 200

// ItemSizeMax is the most that an item can take in JSON.
func ItemSizeMax(it KeyItem, keysOnly bool) int {
	n := len(it.Key)
	if !keysOnly {
		n += len(it.Value)
	}
	return ItemFixedSize + 6*n // each byte may be an escape
}

// ItemJSONSize is what an item takes in JSON, or a little more.
func ItemJSONSize(it KeyItem, keysOnly bool) int {
	n := ItemFixedSize + jsonSize(it.Key)
	if !keysOnly {
		n += jsonSize(it.Value)
	}
	return n
}

// jsonSize is what a key or value takes in JSON.
func jsonSize(s string) int {
	if !utf8.ValidString(s) {
		return base64.StdEncoding.EncodedLen(len(s))
	}
	n := len(s)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\' || c == '\n' || c == '\r' || c == '\t':
			n++
		case c < ' ':
			n += 5
		}
	}
	return n
}
