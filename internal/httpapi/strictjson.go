package httpapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"raftrv/internal/fault"
)

// This file reads the JSON of all bodies. encoding/json alone would take names in
// any case, and of two values with one name the last: a proxy that looks at a
// request, or a person, could see another request than we do.

// jsonField is a field that an object may have, and where its value goes.
type jsonField struct {
	name string
	into any // a pointer
}

// decodeBody reads a body that is one JSON object.
func decodeBody(body string, fields ...jsonField) error {
	if !utf8.ValidString(body) || hasLoneSurrogate(body) {
		return fault.ErrInvalid.WithDetail("the body is not Unicode text; keys and values of other bytes go into keyBase64 and valueBase64")
	}
	return decodeObject("", []byte(body), fields...)
}

// decodeObject reads one JSON object with some of the fields, each of them at
// most once, its name spelt exactly. null stands for a field that is not there.
// place is where in the body the object is, for errors.
func decodeObject(place string, data []byte, fields ...jsonField) error {
	d := json.NewDecoder(bytes.NewReader(data))
	fail := func(err error) error {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fault.ErrInvalid.WithDetail("%s: %s", placeName(place), strings.TrimPrefix(err.Error(), "json: "))
	}
	token, err := d.Token()
	if err != nil {
		return fail(err)
	}
	if token != json.Delim('{') {
		return fault.ErrInvalid.WithDetail("%s: must be a JSON object", placeName(place))
	}
	var seen uint64 // bit i: field i
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return fail(err)
		}
		name, _ := token.(string) // in an object there is nothing else
		i := indexField(fields, name)
		switch {
		case i < 0:
			return fail(fmt.Errorf("unknown field %q; there are %s", name, fieldNames(fields)))
		case seen&(1<<i) != 0:
			return fail(fmt.Errorf("field %q is given twice", name))
		}
		seen |= 1 << i
		if err := d.Decode(fields[i].into); err != nil {
			if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
				return fault.ErrInvalid.WithDetail("%s: a JSON %s is no %s", strings.TrimPrefix(place+"."+name, "."), e.Value, jsonKind(e.Type))
			}
			return fail(err)
		}
	}
	if _, err := d.Token(); err != nil { // the closing brace
		return fail(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fault.ErrInvalid.WithDetail("%s: something follows the JSON object", placeName(place))
	}
	return nil
}

func indexField(fields []jsonField, name string) int {
	for i := range fields {
		if fields[i].name == name {
			return i
		}
	}
	return -1
}

func fieldNames(fields []jsonField) string {
	var names []string
	for _, f := range fields {
		names = append(names, f.name)
	}
	return strings.Join(names, ", ")
}

// jsonKind says what would have been right where another kind of value was.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Uint64:
		return "whole number that is not negative"
	case reflect.Slice:
		return "array"
	default:
		return "string"
	}
}

// placeName names a place in a body.
func placeName(place string) string {
	if place == "" {
		return "the body"
	}
	return place
}
