package store

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"raftrv/internal/testkit"
)

// TestItems: the tree of items and that of their types are as one, through copies and snapshots.
func TestItems(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	st := NewState()
	st.SetLevel(3)
	m, model := st.Items, map[string]Item{}
	check := func(m *itemMap, model map[string]Item) {
		t.Helper()
		from := fmt.Sprint(random.IntN(100))
		var got, want []KeyItem
		m.Ascend(from, func(key string, it Item) bool {
			got = append(got, KeyItem{key, it})
			return true
		})
		for _, key := range slices.Sorted(maps.Keys(model)) {
			if key >= from {
				want = append(want, KeyItem{key, model[key]})
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("from %s: %v\nwant %v", from, got, want)
		}
		typed := 0
		for key, it := range model {
			if got, ok := m.Get(key); !ok || got != it {
				t.Fatalf("%s: %v, want %v", key, got, it)
			}
			if it.ContentType != "" {
				typed++
			}
		}
		if m.Len() != len(model) || m.types.Len() != typed {
			t.Fatalf("%d items, %d of them with a type, want %d, %d", m.Len(), m.types.Len(), len(model), typed)
		}
	}
	types := []string{"", "", "text/plain", "application/json"}
	for i := range 3000 {
		key := fmt.Sprint(random.IntN(100))
		before, existed := model[key]
		if random.IntN(3) > 0 {
			it := Item{Value: fmt.Sprint(i), RV: uint64(i), Created: 1, ContentType: types[random.IntN(len(types))]}
			if old, replaced := m.Set(key, it); old != before || replaced != existed {
				t.Fatalf("%s: replaces %v, %v", key, old, replaced)
			}
			model[key] = it
		} else {
			if old, deleted := m.Delete(key); old != before || deleted != existed {
				t.Fatalf("%s: deletes %v, %v", key, old, deleted)
			}
			delete(model, key)
		}
		if i%100 == 0 {
			check(m, model)
			// Who writes to the one does not disturb the other.
			c, then := m.Copy(), maps.Clone(model)
			m.Set("x", Item{ContentType: "x/y"})
			m.Delete(key)
			check(c, then)
			m.Delete("x")
			delete(model, key)
		}
	}
	again, err := ReadState(bytes.NewReader(stateBytes(t, st)))
	testkit.Must(t, err)
	check(again.Items, model)
	// What most items do not have costs them nothing.
	if size := unsafe.Sizeof(storedItem{}); size != 40 {
		t.Errorf("an item takes %d bytes", size)
	}
}
