package tests

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"raftrv/internal/proc"
	"raftrv/internal/testkit"
)

var rewrite = flag.Bool("rewrite", false, "write what came back into the files that are compared with it")

const (
	apiPage = "docs/api.md"

	// In the page, for that of the node:
	apiAddress = "http://127.0.0.1:12380"
)

// example is a command of a page and its output.
type example struct {
	command string
	want    string
}

// splitExamples separates a page into its ```console blocks, in which a line
// that begins with "$ " is a command, and the text around them. Lines of a
// command are joined until its quotes are closed.
func splitExamples(page string) (text []string, blocks [][]example) {
	for {
		before, rest, ok := strings.Cut(page, "```console\n")
		if !ok {
			return append(text, page), blocks
		}
		block, after, _ := strings.Cut(rest, "```")
		var examples []example
		isOpen := false
		for line := range strings.Lines(block) {
			command, isCommand := strings.CutPrefix(line, "$ ")
			switch last := len(examples) - 1; {
			case isOpen:
				examples[last].command += line
				isOpen = strings.Count(examples[last].command, "'")%2 != 0
			case isCommand:
				examples = append(examples, example{command: command})
				isOpen = strings.Count(command, "'")%2 != 0
			default:
				examples[last].want += line
			}
		}
		text, blocks = append(text, before), append(blocks, examples)
		page = after
	}
}

// Replaced in what comes back, since it differs from run to run.
var outputRules = []struct {
	pattern     *regexp.Regexp
	replacement string
}{
	{regexp.MustCompile(`\r\n`), "\n"},
	{regexp.MustCompile(`(Date|Expires): .*GMT`), "$1: Fri, 20 Nov 2026 12:00:00 GMT"},
	{regexp.MustCompile(`"expiresAt":"[^"]*"`), `"expiresAt":"2026-11-20T12:00:00.000Z"`},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}`), "019aa0f0-5c00-7000-8000-000000000001"},
	{regexp.MustCompile(`"instanceId":"\d+"`), `"instanceId":"1311768467463790320"`},
	{regexp.MustCompile(`"clusterId":"[^"]*"`), `"clusterId":"5d0c9b8a7f6e4d3b"`},
	{regexp.MustCompile(`"(term|committedIndex|appliedIndex|diskFreeBytes)":\d+`), `"$1":0`},
	{regexp.MustCompile(`"stateSum":"[^"]*"`), `"stateSum":"8f1d3c5b7a9e2046"`},
	{regexp.MustCompile(`Cluster-Id: [0-9a-f]+`), `Cluster-Id: 5d0c9b8a7f6e4d3b`},
	{regexp.MustCompile(`this is cluster [0-9a-f]+`), "this is cluster 5d0c9b8a7f6e4d3b"},
	{regexp.MustCompile(`(?m)^id: [0-9a-f]+-`), "id: 5d0c9b8a7f6e4d3b-"},
	{regexp.MustCompile(`Raft-(Index|Term): \d+`), `Raft-$1: 0`},
	{regexp.MustCompile(`Repr-Digest: sha-256=:[^:]+:`), `Repr-Digest: sha-256=:UGphulEVTTE3qxYkK+EzuKVwYuZo9ZQRrk8FYUPZfKI=:`},
	{regexp.MustCompile(`"goVersion":"[^"]*"`), `"goVersion":"go1.26"`},
	{regexp.MustCompile(`"version":"[^"]*"`), `"version":"v1"`},
}

// TestDocs_API runs every command of the page and compares what comes back.
func TestDocs_API(t *testing.T) {
	c := newLiveCluster(t, proc.Options{Nodes: 1})
	c.runPage(apiPage, "", "", func(int) {})
}

// TestDocs_Operations does so for the part of the page that needs no more than a
// cluster and somebody who stops nodes.
func TestDocs_Operations(t *testing.T) {
	c := newLiveCluster(t, proc.Options{})
	three := c.Nodes[2]
	c.runPage("docs/operations.md", "### First questions", "### Which metric", func(block int) {
		switch block {
		case 1:
			c.kill(c.Nodes[:2]...)
			c.eventually(func() error { return c.answers(three, "/-/readyz?verbose", "[-]leader") })
		case 2:
			for _, n := range c.Nodes[:2] {
				testkit.Must(t, n.Start())
			}
			testkit.Must(t, c.WaitReady(c.context()))
			c.eventually(func() error {
				if err := c.answers(three, "/-/v1/status", `"role":"leader"`); err != nil {
					c.memberCall(three, http.MethodPost, "/-/v1/leader/3", "")
					return err
				}
				return nil
			})
			c.eventually(func() error { return c.answers(c.Nodes[1], "/-/v1/status", `"leaderId":3,`) })
			testkit.Must(t, c.Nodes[0].Pause())
		}
	})
}

// answers says whether a node's answer has a text.
func (c *liveCluster) answers(n *proc.Node, path, text string) error {
	r := c.memberCall(n, http.MethodGet, path, "")
	if r.err != nil || !strings.Contains(string(r.body), text) {
		return fmt.Errorf("node %d answers %s, %v; want %s", n.ID, r.body, r.err, text)
	}
	return nil
}

// runPage runs the commands of a page, from one line on and up to another, and
// compares what comes back. It calls before ahead of each block.
func (c *liveCluster) runPage(path, from, to string, before func(block int)) {
	t := c.t
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("there is no curl here")
	}
	whole := testkit.ReadFile(t, path)
	start := strings.Index(whole, from)
	length := len(whole) - start
	if to != "" {
		length = strings.Index(whole[start:], to)
	}
	text, blocks := splitExamples(whole[start : start+length])
	if len(blocks) == 0 {
		t.Fatalf("no commands in %s", path)
	}
	var page strings.Builder
	for i, block := range blocks {
		before(i)
		page.WriteString(text[i] + "```console\n")
		for _, e := range block {
			got := c.runExample(e.command)
			fmt.Fprintf(&page, "$ %s%s", e.command, got)
			if got != e.want && !*rewrite {
				t.Errorf("$ %s%s\nwant\n%s", e.command, got, e.want)
			}
		}
		page.WriteString("```")
	}
	page.WriteString(text[len(text)-1])
	if *rewrite {
		testkit.Must(t, os.WriteFile(path, []byte(whole[:start]+page.String()+whole[start+length:]), 0o644))
	}
}

// addresses has each address of the pages, and that of a node.
func (c *liveCluster) addresses() (pairs []string) {
	for i, n := range c.Nodes {
		pairs = append(pairs, fmt.Sprintf("http://127.0.0.1:%d2380", i+1), n.URL(), fmt.Sprintf("http://127.0.0.1:%d2379", i+1), n.RaftURL())
	}
	return pairs
}

// runExample runs a command with the addresses replaced by those of the nodes.
func (c *liveCluster) runExample(command string) string {
	c.t.Helper()
	if !strings.HasPrefix(command, "curl ") {
		c.t.Fatalf("%s is no curl command", command)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	pairs := c.addresses()
	command = strings.NewReplacer(pairs...).Replace(command)
	cmd := exec.CommandContext(ctx, "bash", "-c", command)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		c.t.Errorf("%s: %v", command, err)
	}
	slices.Reverse(pairs)
	got := strings.NewReplacer(pairs...).Replace(string(out))
	for _, rule := range outputRules {
		got = rule.pattern.ReplaceAllString(got, rule.replacement)
	}
	if got != "" && !strings.HasSuffix(got, "\n") {
		got += "\n"
	}
	return got
}

// TestDocs_README types what the page says, in its order. No call may be answered with an error.
func TestDocs_README(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("there is no curl here")
	}
	c := newLiveCluster(t, proc.Options{})
	two := c.Nodes[1]
	four, err := c.Add()
	testkit.Must(t, err)
	c.client(two).mustPut("n", "7")
	dir := t.TempDir()
	testkit.Must(t, os.Symlink(buildLiveBinary(t), filepath.Join(dir, "raftrv")))
	testkit.Must(t, os.WriteFile(filepath.Join(dir, ".curlrc"), []byte("fail\nshow-error\n"), 0o600))
	addresses := strings.NewReplacer(c.addresses()...)
	var peers []string
	for _, n := range c.Nodes[:3] {
		peers = append(peers, n.RaftURL())
	}
	ran := 0
	for line := range strings.Lines(testkit.ReadFile(t, "README.md")) {
		command, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "    ")
		switch {
		case !ok:
		case strings.HasSuffix(command, `"run stop raftrv2"`):
			c.stop(two)
		case strings.HasSuffix(command, `"run start raftrv2"`):
			testkit.Must(t, two.Start())
			testkit.Must(t, two.WaitReady(c.context()))
		case strings.HasPrefix(command, "./raftrv --id 4 --join"):
			testkit.Must(t, four.Start())
			c.wantVoter(c.Nodes[0], four)
		case strings.HasPrefix(command, "curl "), strings.HasPrefix(command, "./raftrv backup "):
			cmd := exec.CommandContext(c.context(), "bash", "-c", addresses.Replace(command))
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "LC_ALL=C", "CURL_HOME="+dir, "PEERS="+strings.Join(peers, ","))
			out, err := cmd.CombinedOutput()
			is412 := strings.Contains(command, "# 412") && strings.Contains(string(out), "error: 412")
			if err != nil && !is412 {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
			ran++
		}
	}
	if ran < 17 {
		t.Errorf("the page has %d commands", ran)
	}
	c.wantRemoved(four)
	c.Forget(four)
}

var (
	curlMethod = regexp.MustCompile(`(?:^| )-X ([A-Z]+)`)
	curlURL    = regexp.MustCompile(regexp.QuoteMeta(apiAddress) + `([^' \n]*)`)
	curlBody   = regexp.MustCompile(`(?:^| )(-d|--data-binary) `)
)

// Every call and every code of an error is on the page.
func TestDocs_APIIsComplete(t *testing.T) {
	b, err := os.ReadFile(apiPage)
	if err != nil {
		t.Fatal(err)
	}
	var document struct{ Paths map[string]map[string]any }
	testkit.Must(t, json.Unmarshal([]byte(testkit.ReadFile(t, "internal/httpapi/openapi.json")), &document)) // of which a test of the front says that it is whole
	shown := map[string]bool{}
	_, blocks := splitExamples(string(b))
	for _, block := range blocks {
		for _, e := range block {
			method := http.MethodGet
			if curlBody.MatchString(e.command) {
				method = http.MethodPost
			}
			if m := curlMethod.FindStringSubmatch(e.command); m != nil {
				method = m[1]
			}
			target := curlURL.FindStringSubmatch(e.command)
			if target == nil {
				t.Fatalf("%s has no URL", e.command)
			}
			shown[method+" "+documentedPath(t, document.Paths, target[1])] = true
		}
	}
	for path, calls := range document.Paths {
		for method := range calls {
			if method := strings.ToUpper(method); method != "PARAMETERS" && method != "HEAD" && !shown[method+" "+path] {
				t.Errorf("%s %s is not on the page", method, path)
			}
		}
	}
	source, err := os.ReadFile("internal/fault/errors.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`code: "([a-z-]+)"`).FindAllStringSubmatch(string(source), -1) {
		if !strings.Contains(string(b), "| `"+m[1]+"` |") {
			t.Errorf("the code %s is not on the page", m[1])
		}
	}
}

// documentedPath returns the path of openapi.json that a request's target is an instance of.
func documentedPath(t *testing.T, paths map[string]map[string]any, target string) string {
	t.Helper()
	path, _, _ := strings.Cut(target, "?")
	if _, ok := paths[path]; ok {
		return path
	}
	if !strings.HasPrefix(path, "/-/") {
		return "/{key}"
	}
	for pattern := range paths {
		if pattern != "/{key}" && regexp.MustCompile("^"+parameter.ReplaceAllString(strings.ReplaceAll(pattern, "{key}", ".+"), "[^/]+")+"$").MatchString(path) {
			return pattern
		}
	}
	t.Errorf("%s is no call", target)
	return ""
}

var parameter = regexp.MustCompile(`\{[^}]*\}`)
