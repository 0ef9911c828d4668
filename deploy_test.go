package main

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v2"

	"raftrv/internal/httpapi"
	"raftrv/internal/testkit"
)

// What deploy/ has is only read here: neither Prometheus nor Grafana nor Docker
// is needed. Its queries must use metrics that there are, its command lines
// flags that there are.

const deployDir = "deploy"

func readYAML(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(deployDir, name))
	testkit.Must(t, err)
	if err := yaml.UnmarshalStrict(b, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// alertRule is a rule of alerts.yml.
type alertRule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func readAlerts(t *testing.T) []alertRule {
	var file struct {
		Groups []struct {
			Name  string      `yaml:"name"`
			Rules []alertRule `yaml:"rules"`
		} `yaml:"groups"`
	}
	readYAML(t, "alerts.yml", &file)
	var rules []alertRule
	for _, g := range file.Groups {
		rules = append(rules, g.Rules...)
	}
	return rules
}

// dashboard is as much of dashboard.json as is checked.
type dashboard struct {
	UID        string `json:"uid"`
	Templating struct {
		List []struct {
			Name  string          `json:"name"`
			Type  string          `json:"type"`
			Query json.RawMessage `json:"query"`
		} `json:"list"`
	} `json:"templating"`
	Annotations struct {
		List []struct {
			Expr string `json:"expr"`
		} `json:"list"`
	} `json:"annotations"`
	Panels []struct {
		ID      int    `json:"id"`
		Type    string `json:"type"`
		Title   string `json:"title"`
		GridPos struct{ H, W, X, Y int }
		Targets []struct {
			RefID        string `json:"refId"`
			Expr         string `json:"expr"`
			LegendFormat string `json:"legendFormat"`
		} `json:"targets"`
	} `json:"panels"`
}

func readDashboard(t *testing.T) dashboard {
	var d dashboard
	testkit.Must(t, json.Unmarshal([]byte(testkit.ReadFile(t, filepath.Join(deployDir, "dashboard.json"))), &d))
	return d
}

// metricCatalog is what a query may be made of.
type metricCatalog struct {
	types  map[string]string // of metrics: counter, gauge, histogram or ""
	labels map[string]bool
}

var (
	descLabels    = regexp.MustCompile(`variableLabels: \{([^}]*)\}`)
	descName      = regexp.MustCompile(`fqName: "([^"]*)"`)
	queryName     = regexp.MustCompile(`\b(raftrv|go|process)_[a-z_]+|\bup\b`)
	queryStrings  = regexp.MustCompile(`"[^"]*"`)
	queryMatchers = regexp.MustCompile(`([a-zA-Z_]+)\s*(?:=~|!~|!=|=)\s*"`)
	queryBy       = regexp.MustCompile(`\bby \(([^)]*)\)`)
	templateLabel = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}`)
)

func newMetricCatalog(t *testing.T) metricCatalog {
	n, clients := idleNode(t)
	registry := newRegistry(n, clients, nil)
	m := httpapi.NewHTTPMetrics()
	registry.MustRegister(m)
	m.Calls[1].Count(200)
	m.Calls[1].Observe(time.Millisecond, 1)
	c := metricCatalog{
		types:  map[string]string{"up": "gauge"},
		labels: map[string]bool{"job": true, "instance": true, "cluster": true, "le": true}, // Prometheus' own, and that of prometheus.yml
	}
	descs := make(chan *prometheus.Desc, 1000)
	registry.Describe(descs)
	close(descs)
	for d := range descs {
		c.types[descName.FindStringSubmatch(d.String())[1]] = ""
		for label := range strings.SplitSeq(descLabels.FindStringSubmatch(d.String())[1], ",") {
			c.labels[label] = true
		}
	}
	families, err := registry.Gather()
	testkit.Must(t, err)
	for _, f := range families {
		c.types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	return c
}

// check says what is wrong with a query.
func (c metricCatalog) check(query string) error {
	names := queryName.FindAllString(queryStrings.ReplaceAllString(query, `""`), -1)
	if len(names) == 0 {
		return fmt.Errorf("it has no metric")
	}
	for _, name := range names {
		kind, ok := c.types[name]
		if !ok {
			kind, ok = c.types[testkit.BaseName(name)]
			if ok && kind != "histogram" && kind != "" {
				return fmt.Errorf("%s is no histogram", testkit.BaseName(name))
			}
		} else if kind == "histogram" {
			return fmt.Errorf("%s is a histogram, which has _bucket, _sum and _count only", name)
		}
		if !ok {
			return fmt.Errorf("there is no metric %s", name)
		}
		if kind == "counter" && !regexp.MustCompile(`(rate|increase)\(`+name).MatchString(query) {
			return fmt.Errorf("%s is a counter, of which only the growth says something", name)
		}
	}
	labels := []string{}
	for _, m := range queryMatchers.FindAllStringSubmatch(query, -1) {
		labels = append(labels, m[1])
	}
	for _, m := range queryBy.FindAllStringSubmatch(query, -1) {
		for label := range strings.SplitSeq(m[1], ",") {
			labels = append(labels, strings.TrimSpace(label))
		}
	}
	for _, label := range labels {
		if !c.labels[label] {
			return fmt.Errorf("there is no label %s", label)
		}
	}
	depth := 0
	for _, r := range queryStrings.ReplaceAllString(query, `""`) {
		switch r {
		case '(', '{', '[':
			depth++
		case ')', '}', ']':
			depth--
		}
	}
	if depth != 0 {
		return fmt.Errorf("a bracket is not closed")
	}
	return nil
}

// checkTemplate says what is wrong with a text that has labels in it.
func (c metricCatalog) checkTemplate(text string) error {
	for _, m := range templateLabel.FindAllStringSubmatch(text, -1) {
		if !c.labels[m[1]] {
			return fmt.Errorf("there is no label %s", m[1])
		}
	}
	return nil
}

// The check itself finds what it is for.
func TestDeploy_CheckFindsMistakes(t *testing.T) {
	c := newMetricCatalog(t)
	for _, query := range []string{
		"raftrv_no_such_metric > 1", "raftrv_keys_bucket", "raftrv_fsync_duration_seconds", "raftrv_leader_changes_total > 3",
		`raftrv_keys{no="x"}`, "sum by (no) (raftrv_keys)", "rate(raftrv_leader_changes_total[5m]", "vector(1)", "go_none", `1 > "raftrv_keys"`,
	} {
		if c.check(query) == nil {
			t.Errorf("%s passes", query)
		}
	}
	for _, query := range []string{
		"raftrv_keys", `sum by (instance, le) (rate(raftrv_fsync_duration_seconds_bucket{cluster="x"}[5m]))`, "up == 0", "go_goroutines",
		"raftrv_peer_round_trip_seconds_count",
	} {
		if err := c.check(query); err != nil {
			t.Errorf("%s: %v", query, err)
		}
	}
}

func TestDeploy_Alerts(t *testing.T) {
	c := newMetricCatalog(t)
	rules := readAlerts(t)
	seen := map[string]bool{}
	page := testkit.ReadFile(t, "docs/operations.md")
	for _, r := range rules {
		if !strings.HasPrefix(r.Alert, "Raftrv") || seen[r.Alert] {
			t.Errorf("%q is no name, or there twice", r.Alert)
		}
		seen[r.Alert] = true
		if err := c.check(r.Expr); err != nil {
			t.Errorf("%s: %v", r.Alert, err)
		}
		if _, err := time.ParseDuration(r.For); r.For != "" && err != nil {
			t.Errorf("%s: %v", r.Alert, err)
		}
		if s := r.Labels["severity"]; s != "page" && s != "ticket" {
			t.Errorf("%s has the severity %q", r.Alert, s)
		}
		if r.Annotations["summary"] == "" {
			t.Errorf("%s has no summary", r.Alert)
		}
		for _, text := range r.Annotations {
			if err := c.checkTemplate(text); err != nil {
				t.Errorf("%s: %v", r.Alert, err)
			}
		}
		if !strings.Contains(page, "`"+r.Alert+"`") {
			t.Errorf("docs/operations.md does not say what to do about %s", r.Alert)
		}
	}
	if len(rules) == 0 {
		t.Error("there are no rules")
	}
}

func TestDeploy_Dashboard(t *testing.T) {
	c := newMetricCatalog(t)
	d := readDashboard(t)
	ids := map[int]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || p.GridPos.W == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %d, %q", p.ID, p.Title)
		}
		ids[p.ID] = true
		if (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("%s has %d queries", p.Title, len(p.Targets))
		}
		for _, q := range p.Targets {
			if err := c.check(q.Expr); err != nil {
				t.Errorf("%s: %v: %s", p.Title, err, q.Expr)
			}
			if err := c.checkTemplate(q.LegendFormat); err != nil {
				t.Errorf("%s: %v", p.Title, err)
			}
		}
	}
	for _, a := range d.Annotations.List {
		if err := c.check(a.Expr); err != nil {
			t.Errorf("%s: %v", a.Expr, err)
		}
	}
	if len(ids) < 20 || d.UID == "" {
		t.Errorf("%d panels", len(ids))
	}
}

// Of all our metrics the dashboard shows those that change.
func TestDeploy_DashboardIsComplete(t *testing.T) {
	used := testkit.ReadFile(t, filepath.Join(deployDir, "dashboard.json")) + testkit.ReadFile(t, filepath.Join(deployDir, "alerts.yml"))
	for name := range describedNames(t) {
		switch name {
		case "raftrv_member_id", "raftrv_term", "raftrv_committed_index", "raftrv_applied_index", "raftrv_batch_bytes", "raftrv_proposal_queue_batches",
			"raftrv_inbox_messages", "raftrv_snapshot_index", "raftrv_connections_accepted_total", "raftrv_watch_window_events":
			continue // for those who look closer
		}
		if !strings.Contains(used, name) {
			t.Errorf("neither the dashboard nor an alert uses %s", name)
		}
	}
}

// The pages that tell people what to look at name what there is.
func TestDeploy_PagesNameMetricsThatExist(t *testing.T) {
	c := newMetricCatalog(t)
	for _, page := range []string{"docs/operations.md", "docs/api.md", "README.md"} {
		for _, name := range regexp.MustCompile(`\braftrv_[a-z_]+[a-z]\b`).FindAllString(testkit.ReadFile(t, page), -1) {
			if _, ok := c.types[testkit.BaseName(name)]; !ok {
				t.Errorf("%s: there is no metric %s", page, name)
			}
		}
	}
}

// composeFile is as much of compose.yml as is checked.
type composeFile struct {
	Services map[string]struct {
		Image   string   `yaml:"image"`
		Command []string `yaml:"command"`
		Ports   []string `yaml:"ports"`
		Volumes []string `yaml:"volumes"`
	} `yaml:"services"`
	Volumes map[string]any `yaml:"volumes"`
}

// The command lines of compose.yml make one cluster, and Prometheus finds it.
func TestDeploy_Compose(t *testing.T) {
	var compose composeFile
	b, err := os.ReadFile(filepath.Join(deployDir, "compose.yml"))
	testkit.Must(t, err)
	testkit.Must(t, yaml.Unmarshal(b, &compose))
	var nodes, clusters []string
	for name, service := range compose.Services {
		if service.Image != "raftrv" {
			continue
		}
		var cfg config
		flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
		cfg.flags(flags)
		testkit.Must(t, flags.Parse(service.Command))
		testkit.Must(t, cfg.validate())
		clusters = append(clusters, cfg.cluster)
		client, err := url.Parse(cfg.clientURL)
		testkit.Must(t, err)
		nodes = append(nodes, client.Host)
		peer, err := url.Parse(cfg.self().PeerURL)
		testkit.Must(t, err)
		if name != fmt.Sprintf("raftrv%d", cfg.id) || client.Hostname() != name || peer.Hostname() != name {
			t.Errorf("%s has the ID %d and the URLs %s and %s", name, cfg.id, client, peer)
		}
		if cfg.listen != "0.0.0.0:"+client.Port() || cfg.listenPeer != "0.0.0.0:"+peer.Port() || cfg.dataDir != "/data" {
			t.Errorf("%s listens at %s and %s and keeps its data in %s", name, cfg.listen, cfg.listenPeer, cfg.dataDir)
		}
		for _, port := range service.Ports {
			if !strings.HasPrefix(port, "127.0.0.1:") {
				t.Errorf("%s is open to everybody at %s", name, port)
			}
		}
		volume, _, _ := strings.Cut(service.Volumes[0], ":")
		if _, ok := compose.Volumes[volume]; !ok {
			t.Errorf("%s has no volume of its own", name)
		}
	}
	slices.Sort(nodes)
	if len(nodes) != 3 || len(slices.Compact(clusters)) != 1 {
		t.Errorf("%v in %v", nodes, clusters)
	}
	var scraped struct {
		Global        map[string]string `yaml:"global"`
		RuleFiles     []string          `yaml:"rule_files"`
		ScrapeConfigs []struct {
			JobName       string `yaml:"job_name"`
			MetricsPath   string `yaml:"metrics_path"`
			StaticConfigs []struct {
				Targets []string          `yaml:"targets"`
				Labels  map[string]string `yaml:"labels"`
			} `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
	}
	readYAML(t, "prometheus.yml", &scraped)
	job := scraped.ScrapeConfigs[0]
	if !slices.Equal(job.StaticConfigs[0].Targets, nodes) || job.JobName != "raftrv" || !slices.Equal(scraped.RuleFiles, []string{"alerts.yml"}) {
		t.Errorf("%+v, want %v", scraped, nodes)
	}
	if rt, _ := httpapi.FindReserved(job.MetricsPath); rt == nil || rt.Call("GET") == nil {
		t.Errorf("there is no call %s", job.MetricsPath)
	}
	if _, ok := job.StaticConfigs[0].Labels["cluster"]; !ok {
		t.Error("the alerts need the label cluster")
	}
	for _, file := range []string{"prometheus.yml", "alerts.yml"} {
		if !slices.ContainsFunc(compose.Services["prometheus"].Volumes, func(v string) bool { return strings.HasPrefix(v, "./"+file+":") }) {
			t.Errorf("Prometheus does not get %s", file)
		}
	}
}

// The Dockerfile builds with the language that go.mod asks for.
func TestDeploy_Dockerfile(t *testing.T) {
	docker := testkit.ReadFile(t, filepath.Join(deployDir, "Dockerfile"))
	language := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(testkit.ReadFile(t, "go.mod"))[1]
	for _, line := range []string{"FROM golang:" + language + ".", "CGO_ENABLED=0 ", "-X main.version=", "FROM scratch\n", `ENTRYPOINT ["/raftrv"]`} {
		if !strings.Contains(docker, line) {
			t.Errorf("it has no %s", line)
		}
	}
}

// What others made is named by its content: a tag can be moved to something else.
func TestDeploy_Pinned(t *testing.T) {
	foreign := regexp.MustCompile(`(?m)^\s*(?:FROM|image:|- uses:|uses:) +(\S+)`)
	pinned := regexp.MustCompile(`@(sha256:[0-9a-f]{64}|[0-9a-f]{40})$`)
	ours := []string{"scratch", "raftrv"}
	for _, path := range []string{"deploy/Dockerfile", "deploy/compose.yml", ".github/workflows/check.yml"} {
		found := foreign.FindAllStringSubmatch(testkit.ReadFile(t, path), -1)
		if len(found) == 0 {
			t.Errorf("%s names nothing", path)
		}
		for _, m := range found {
			if !slices.Contains(ours, m[1]) && !pinned.MatchString(m[1]) {
				t.Errorf("%s: %s is not pinned", path, m[1])
			}
		}
	}
}
