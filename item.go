package main

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

// appendItemJSON appends an item, without its value if keysOnly.
func appendItemJSON(buf []byte, key string, it item, keysOnly bool) []byte {
	buf = append(buf, '{')
	buf = appendBytesField(buf, "key", key)
	if !keysOnly {
		buf = append(buf, ',')
		buf = appendBytesField(buf, "value", it.value)
	}
	buf = append(buf, `,"resourceVersion":`...)
	buf = strconv.AppendUint(buf, it.rv, 10)
	buf = append(buf, `,"createdResourceVersion":`...)
	buf = strconv.AppendUint(buf, it.created, 10)
	if it.expires != 0 {
		buf = append(buf, `,"expiresAt":"`...)
		buf = time.UnixMilli(it.expires).UTC().AppendFormat(buf, expiresAtLayout)
		buf = append(buf, '"')
	}
	if it.contentType != "" {
		buf = append(buf, ',')
		buf = appendBytesField(buf, "contentType", it.contentType)
	}
	return append(buf, '}')
}

// appendBytesField appends "name":"text", or "nameBase64":"..." if the bytes are
// not text.
func appendBytesField(buf []byte, name, s string) []byte {
	buf = append(buf, '"')
	buf = append(buf, name...)
	if !utf8.ValidString(s) {
		buf = append(buf, `Base64":"`...)
		buf = base64.StdEncoding.AppendEncode(buf, []byte(s))
		return append(buf, '"')
	}
	buf = append(buf, `":`...)
	return appendJSONString(buf, s)
}

// appendJSONString appends valid UTF-8 as a JSON string.
func appendJSONString(buf []byte, s string) []byte {
	buf = append(buf, '"')
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
	buf = append(buf, s[start:]...)
	return append(buf, '"')
}
