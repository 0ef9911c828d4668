package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"
)

// report is everything that was measured; it is also the format of -json.
type report struct {
	Time     time.Time     `json:"time"`
	Go       string        `json:"go"`
	Cores    int           `json:"cores"`
	Fsync    time.Duration `json:"fsyncNs"`
	Duration time.Duration `json:"durationNs"` // of one cell
	Reps     int           `json:"reps"`
	Cells    []result      `json:"cells"`
}

// result is a cell and what came of it. Fields other than the samples are medians over them.
type result struct {
	Name     string   `json:"name"`
	Baseline string   `json:"baseline,omitempty"`
	Bar      float64  `json:"bar,omitempty"`
	Samples  []sample `json:"samples"`
	Median   sample   `json:"median"`
	// Spread is the distance of the fastest from the slowest sample, as a share of the median.
	Spread float64 `json:"spread"`
	// Share is of the baseline, taken in each repetition: what slows a repetition down slows both.
	Share float64 `json:"share,omitempty"`
	Pass  bool    `json:"pass"`
}

func newReport(c config, fsync time.Duration, cells []cell) *report {
	r := &report{
		Time:     time.Now().UTC().Truncate(time.Second),
		Go:       runtime.Version(),
		Cores:    runtime.NumCPU(),
		Fsync:    fsync,
		Duration: c.duration,
		Reps:     c.reps,
	}
	for _, c := range cells {
		r.Cells = append(r.Cells, result{Name: c.name, Baseline: c.baseline, Bar: c.bar})
	}
	return r
}

// summarize fills in what follows from the samples.
func (r *report) summarize() {
	baselines := make(map[string][]sample)
	for _, c := range r.Cells {
		baselines[c.Name] = c.Samples
	}
	for i := range r.Cells {
		c := &r.Cells[i]
		c.Median = sample{
			PerSecond: medianOf(c.Samples, func(s sample) float64 { return s.PerSecond }),
			P50:       medianOf(c.Samples, func(s sample) time.Duration { return s.P50 }),
			P99:       medianOf(c.Samples, func(s sample) time.Duration { return s.P99 }),
		}
		slowest, fastest := c.Samples[0].PerSecond, c.Samples[0].PerSecond
		var shares []float64
		for rep, s := range c.Samples {
			slowest, fastest = min(slowest, s.PerSecond), max(fastest, s.PerSecond)
			if c.Baseline != "" {
				shares = append(shares, s.PerSecond/baselines[c.Baseline][rep].PerSecond)
			}
		}
		c.Spread = (fastest - slowest) / c.Median.PerSecond
		if shares != nil {
			c.Share = median(shares)
		}
		c.Pass = c.Share >= c.Bar
	}
}

func medianOf[T float64 | time.Duration](samples []sample, field func(sample) T) T {
	values := make([]T, len(samples))
	for i, s := range samples {
		values[i] = field(s)
	}
	return median(values)
}

// median sorts values.
func median[T float64 | time.Duration](values []T) T {
	slices.Sort(values)
	mid := len(values) / 2
	if len(values)%2 == 1 {
		return values[mid]
	}
	return (values[mid-1] + values[mid]) / 2
}

// print writes the table.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s, %d cores with the load generator on them, fsync %v, median of %d x %v\n\n",
		r.Time.Format(time.DateOnly), r.Go, r.Cores, r.Fsync, r.Reps, r.Duration)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "cell\treq/s\tspread\tp50 ms\tp99 ms\tof empty\tbar\t\t")
	missed := 0
	for _, c := range r.Cells {
		fmt.Fprintf(t, "%s\t%.0f\t%.0f %%\t%s\t%s\t", c.Name, c.Median.PerSecond, 100*c.Spread, millis(c.Median.P50), millis(c.Median.P99))
		if c.Baseline == "" {
			fmt.Fprintln(t, "\t\t\t")
			continue
		}
		verdict := "pass"
		if !c.Pass {
			verdict = "MISS"
			missed++
		}
		fmt.Fprintf(t, "%.3f\t%.2f\t%s\t\n", c.Share, c.Bar, verdict)
	}
	_ = t.Flush() // as with the lines around it, nobody is told that stdout is gone
	fmt.Fprintf(w, "\n%d below the bar\n", missed)
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond))
}

func (r *report) writeJSON(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

const (
	fsyncProbes = 101
	// fsyncMin is less than any disk needs.
	fsyncMin = 10 * time.Microsecond
)

// fsyncTime returns the median time of an fsync in dir, and an error if there can be no disk behind it.
func fsyncTime(dir string) (time.Duration, error) {
	f, err := os.Create(filepath.Join(dir, "fsync"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	times := make([]time.Duration, fsyncProbes)
	for i := range times {
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return 0, err
		}
		start := time.Now()
		if err := f.Sync(); err != nil {
			return 0, err
		}
		times[i] = time.Since(start).Round(time.Microsecond)
	}
	if t := median(times); t >= fsyncMin {
		return t, nil
	}
	return 0, fmt.Errorf("fsync costs nothing in %s (a file system in memory?): name one on a disk with -dir", dir)
}
