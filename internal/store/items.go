package store

import (
	"unique"

	"github.com/tidwall/btree"
)

// This file is the tree of items. Few items have a content type, and there are
// few content types. So they are not where the items are, each of which would
// pay for a field of its own, but in a tree of the keys that have one.

// itemMap has items by key. A copy costs nothing until one of the two is written.
type itemMap struct {
	stored *btree.Map[string, storedItem]
	types  *btree.Map[string, unique.Handle[string]] // of the keys that have one
}

// storedItem is an item without its content type.
type storedItem struct {
	value       string
	rv, created uint64
	expires     int64
}

func newItemMap() *itemMap {
	return &itemMap{stored: new(btree.Map[string, storedItem]), types: new(btree.Map[string, unique.Handle[string]])}
}

// item puts an item together again.
func (s *storedItem) item(contentType string) Item {
	return Item{Value: s.value, RV: s.rv, Created: s.created, Expires: s.expires, ContentType: contentType}
}

func (it *Item) stored() storedItem {
	return storedItem{value: it.Value, rv: it.RV, created: it.Created, expires: it.Expires}
}

func (m *itemMap) Len() int { return m.stored.Len() }

func (m *itemMap) Copy() *itemMap { return &itemMap{stored: m.stored.Copy(), types: m.types.Copy()} }

func (m *itemMap) Get(key string) (Item, bool) {
	s, ok := m.stored.Get(key)
	if !ok {
		return Item{}, false
	}
	return s.item(m.typeOf(key)), true
}

func (m *itemMap) typeOf(key string) string {
	if m.types.Len() == 0 {
		return ""
	}
	if t, ok := m.types.Get(key); ok {
		return t.Value()
	}
	return ""
}

// Set puts an item and returns the one that it replaces.
func (m *itemMap) Set(key string, it Item) (Item, bool) {
	contentType := m.setType(key, it.ContentType)
	old, replaced := m.stored.Set(key, it.stored())
	return old.item(contentType), replaced
}

// Load is Set, faster for a key that sorts last.
func (m *itemMap) Load(key string, it Item) {
	m.setType(key, it.ContentType)
	m.stored.Load(key, it.stored())
}

// setType sets the content type of a key and returns the one that it had.
func (m *itemMap) setType(key, contentType string) (old string) {
	var t unique.Handle[string]
	had := false
	if contentType != "" {
		t, had = m.types.Set(key, unique.Make(contentType))
	} else if m.types.Len() > 0 {
		t, had = m.types.Delete(key)
	}
	if !had {
		return ""
	}
	return t.Value()
}

func (m *itemMap) Delete(key string) (Item, bool) {
	s, ok := m.stored.Delete(key)
	if !ok {
		return Item{}, false
	}
	return s.item(m.setType(key, "")), true
}

// Scan visits all items in key order until visit returns false.
func (m *itemMap) Scan(visit func(key string, it Item) bool) { m.Ascend("", visit) }

// Ascend is Scan from a key on.
func (m *itemMap) Ascend(from string, visit func(key string, it Item) bool) {
	types := m.types.Iter()
	more := types.Seek(from) // it goes along with the items
	m.stored.Ascend(from, func(key string, s storedItem) bool {
		contentType := ""
		if more && types.Key() == key {
			contentType = types.Value().Value()
			more = types.Next()
		}
		return visit(key, s.item(contentType))
	})
}

// Max returns the last item.
func (m *itemMap) Max() (string, Item, bool) {
	key, s, ok := m.stored.Max()
	if !ok {
		return "", Item{}, false
	}
	return key, s.item(m.typeOf(key)), true
}

// intern returns the content type that all items share which have it.
func intern(contentType string) string {
	if contentType == "" {
		return ""
	}
	return unique.Make(contentType).Value()
}
