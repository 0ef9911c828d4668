package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strings"
)

// A mutant is one small bug that can be switched on.
type mutant struct {
	id    int
	file  string
	line  int
	kind  kind
	text  string // the source line
	edits []edit
	first int // lines that it spans
	last  int
}

func (m *mutant) String() string {
	return fmt.Sprintf("%s:%d: %s: %s", m.file, m.line, m.kind, m.text)
}

type kind string

const (
	never   kind = "condition is never true"
	always  kind = "condition is always true"
	negated kind = "result is negated"
	andOr   kind = "&& and || are swapped"
	bound   kind = "bound is off by one"
	sum     kind = "+ and - are swapped"
	plusOne kind = "one more"
	skipped kind = "statement is skipped"
	noCase  kind = "case does nothing"
	noError kind = "error is dropped"
)

// dubious are the kinds whose sites need types that the parser does not know. What does not compile is given up,
// these first.
var dubious = []kind{plusOne, sum, bound}

// edit replaces the bytes from pos to end, by a text that has no line breaks. All mutants are in one program, so
// edits only ever put something around a node, or in the place of its operator.
type edit struct {
	pos, end int
	text     string
	closes   bool // it ends a node: of two at one place the inner node's comes first
}

// sites returns what can be mutated in a file, in the order of the source. Mutants are numbered from id on.
func sites(file string, source []byte, id int) (*ast.File, []*mutant, error) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, file, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, nil, err
	}
	s := &finder{fset: fset, file: file, lines: strings.Split(string(source), "\n"), id: id, conditions: map[ast.Expr]bool{}}
	ast.Inspect(f, s.visit)
	return f, s.found, nil
}

type finder struct {
	fset  *token.FileSet
	file  string
	lines []string
	id    int
	found []*mutant
	// conditions are those of if statements.
	conditions map[ast.Expr]bool
}

func (s *finder) offset(p token.Pos) int { return s.fset.Position(p).Offset }

func (s *finder) add(n ast.Node, k kind, edits func(id int) []edit) {
	first, last := s.fset.Position(n.Pos()).Line, s.fset.Position(n.End()).Line
	s.found = append(s.found, &mutant{
		id: s.id, file: s.file, line: first, kind: k, text: strings.TrimSpace(s.lines[first-1]),
		edits: edits(s.id), first: first, last: last,
	})
	s.id++
}

// around puts texts before and behind a node; %d in before is the mutant's number.
func (s *finder) around(n ast.Node, k kind, before, after string) {
	s.add(n, k, func(id int) []edit {
		return []edit{
			{pos: s.offset(n.Pos()), end: s.offset(n.Pos()), text: strings.ReplaceAll(before, "%d", fmt.Sprint(id))},
			{pos: s.offset(n.End()), end: s.offset(n.End()), text: strings.ReplaceAll(after, "%d", fmt.Sprint(id)), closes: true},
		}
	})
}

// call makes the operator of b a function.
func (s *finder) call(b *ast.BinaryExpr, k kind, function, separator, after string) {
	s.add(b, k, func(id int) []edit {
		op := s.offset(b.OpPos)
		return []edit{
			{pos: s.offset(b.Pos()), end: s.offset(b.Pos()), text: fmt.Sprintf("%s(%d, ", function, id)},
			{pos: op, end: op + len(b.Op.String()), text: separator},
			{pos: s.offset(b.End()), end: s.offset(b.End()), text: after, closes: true},
		}
	})
}

func (s *finder) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GenDecl:
		return n.Tok == token.VAR // constants, types and imports are there before any mutant can be switched on
	case *ast.BlockStmt:
		s.statements(n.List)
	case *ast.CaseClause:
		s.clause(n.Body)
		s.statements(n.Body)
		for _, e := range n.List { // what a case compares with may have to be constant
			if _, ok := e.(*ast.BasicLit); !ok {
				ast.Inspect(e, s.visit)
			}
		}
		for _, b := range n.Body {
			ast.Inspect(b, s.visit)
		}
		return false
	case *ast.CommClause:
		s.clause(n.Body)
		s.statements(n.Body)
	case *ast.IfStmt:
		s.around(n.Cond, never, "(", ") && !mutant(%d)")
		s.around(n.Cond, always, "((", ") || mutant(%d))")
		s.conditions[n.Cond] = true
	case *ast.ExprStmt:
		return !isLogging(n.X)
	case *ast.BinaryExpr:
		s.binary(n)
	case *ast.BasicLit:
		if n.Kind == token.INT {
			s.around(n, plusOne, "mutantInt(%d, ", ")")
		}
	case *ast.ArrayType:
		return false // its length is a constant
	case *ast.ReturnStmt:
		if len(n.Results) > 0 {
			if last, ok := n.Results[len(n.Results)-1].(*ast.Ident); ok && last.Name == "err" {
				s.around(last, noError, "mutantError(%d, ", ")")
			}
		}
	case *ast.Ident:
		if n.Name == "true" || n.Name == "false" {
			s.around(n, negated, "(", " != mutant(%d))")
		}
	}
	return true
}

func (s *finder) binary(b *ast.BinaryExpr) {
	switch b.Op {
	case token.LAND:
		s.call(b, andOr, "mutantAnd", ", func() bool { return (", ") })")
	case token.LOR:
		s.call(b, andOr, "mutantOr", ", func() bool { return (", ") })")
	case token.EQL, token.NEQ:
		if s.conditions[b] {
			return // never and always say more
		}
		s.around(b, negated, "((", ") != mutant(%d))")
	case token.LSS:
		s.call(b, bound, "mutantLess", ", ", ")")
	case token.LEQ:
		s.call(b, bound, "mutantLessOrEqual", ", ", ")")
	case token.GTR:
		s.call(b, bound, "!mutantLessOrEqual", ", ", ")")
	case token.GEQ:
		s.call(b, bound, "!mutantLess", ", ", ")")
	case token.ADD:
		s.call(b, sum, "mutantAdd", ", ", ")")
	case token.SUB:
		s.call(b, sum, "mutantSub", ", ", ")")
	}
}

// statements are those of a block, where each can stand alone.
func (s *finder) statements(list []ast.Stmt) {
	for _, stmt := range list {
		switch n := stmt.(type) {
		case *ast.ExprStmt:
			if isLogging(n.X) || isPanic(n) {
				continue
			}
		case *ast.AssignStmt:
			if n.Tok == token.DEFINE {
				continue
			}
		case *ast.IncDecStmt, *ast.SendStmt, *ast.DeferStmt, *ast.GoStmt:
		case *ast.BranchStmt:
			if n.Tok != token.BREAK && n.Tok != token.CONTINUE {
				continue
			}
		default:
			continue
		}
		s.around(stmt, skipped, "if !mutant(%d) { ", " }")
	}
}

// clause is the body of a case. One that the function cannot go past has to stay.
func (s *finder) clause(body []ast.Stmt) {
	if len(body) == 0 {
		return
	}
	switch n := body[len(body)-1].(type) {
	case *ast.ReturnStmt, *ast.BranchStmt, *ast.ForStmt, *ast.SwitchStmt, *ast.TypeSwitchStmt, *ast.SelectStmt, *ast.BlockStmt:
		return
	case *ast.IfStmt:
		if n.Else != nil {
			return
		}
	case *ast.ExprStmt:
		if isPanic(n) {
			return
		}
	}
	if len(body) == 1 { // then it is the same as without its statement
		switch body[0].(type) {
		case *ast.ExprStmt, *ast.AssignStmt, *ast.IncDecStmt, *ast.SendStmt, *ast.DeferStmt, *ast.GoStmt, *ast.IfStmt:
			return
		}
	}
	s.around(span{body[0].Pos(), body[len(body)-1].End()}, noCase, "if !mutant(%d) { ", " }")
}

// span is the statements of a body as one node.
type span struct{ pos, end token.Pos }

func (s span) Pos() token.Pos { return s.pos }
func (s span) End() token.Pos { return s.end }

func isPanic(n *ast.ExprStmt) bool {
	call, ok := n.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	f, ok := call.Fun.(*ast.Ident)
	return ok && f.Name == "panic"
}

// isLogging says whether a statement only tells somebody something.
func isLogging(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	receiver := ""
	switch x := method.X.(type) {
	case *ast.Ident:
		receiver = x.Name
	case *ast.SelectorExpr:
		receiver = x.Sel.Name
	}
	switch method.Sel.Name {
	case "Debug", "Info", "Warn", "Error":
		return strings.HasPrefix(strings.ToLower(receiver), "log") || receiver == "lg"
	}
	return false
}

// mutate returns the source with all mutants in it.
func mutate(source []byte, mutants []*mutant) []byte {
	var edits []edit
	for _, m := range mutants { // outer nodes come before those in them, and end after them
		edits = append(edits, m.edits...)
	}
	order := make([]int, len(edits))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		x, y := edits[a], edits[b]
		if c := cmp.Compare(x.pos, y.pos); c != 0 {
			return c
		}
		switch {
		case x.closes && y.closes:
			return cmp.Compare(b, a)
		case x.closes:
			return -1
		case y.closes:
			return 1
		}
		return cmp.Compare(a, b)
	})
	var out []byte
	at := 0
	for _, i := range order {
		out = append(out, source[at:edits[i].pos]...)
		out = append(out, edits[i].text...)
		at = edits[i].end
	}
	return append(out, source[at:]...)
}
