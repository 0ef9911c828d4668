package httpapi

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"path/filepath"
	"strconv"
	"testing"

	"raftrv/internal/fault"
	"raftrv/internal/testkit"
)

// TestStatuses: whatever can go wrong has a status, and nothing else does.
func TestStatuses(t *testing.T) {
	codes := faultCodes(t)
	if !codes[fault.ErrInternal.Code] {
		t.Fatalf("these are the codes that were found: %v", codes)
	}
	for code := range codes {
		if _, ok := statuses[code]; !ok {
			t.Errorf("%s has no status", code)
		}
	}
	for code, status := range statuses {
		if !codes[code] {
			t.Errorf("%s has a status and is no error", code)
		}
		if http.StatusText(status) == "" || status < http.StatusBadRequest {
			t.Errorf("the status of %s is %d", code, status)
		}
	}
	if status := statusOf(&fault.Error{Code: "of-tomorrow"}); status != http.StatusInternalServerError {
		t.Errorf("%d", status)
	}
}

// faultCodes returns the codes of all errors, as the source of their package has them.
func faultCodes(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("../fault/*.go")
	testkit.Must(t, err)
	codes := map[string]bool{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		testkit.Must(t, err)
		ast.Inspect(f, func(n ast.Node) bool {
			pair, ok := n.(*ast.KeyValueExpr)
			if !ok {
				return true
			}
			name, _ := pair.Key.(*ast.Ident)
			value, _ := pair.Value.(*ast.BasicLit)
			if name != nil && value != nil && name.Name == "Code" {
				code, err := strconv.Unquote(value.Value)
				testkit.Must(t, err)
				codes[code] = true
			}
			return true
		})
	}
	return codes
}
