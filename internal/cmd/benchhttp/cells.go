package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
)

// cell is one row of the table.
type cell struct {
	name string
	// baseline names the cell of the empty handler that this one is compared to, and bar the least share
	// of it that will do. Both are empty in the cells of the empty handler itself.
	baseline string
	bar      float64
	measure  func(context.Context) (sample, error)
}

// conns are the numbers of connections, columns of the bars.
var conns = [...]int{1, 10, 64, 256}

// bars are the least shares of the empty handler's requests per second that we accept; 0 is no cell.
var bars = []struct {
	load   load
	target string
	bars   [len(conns)]float64
}{
	{putLoad, "leader", [...]float64{0.12, 0.10, 0.28, 0.42}},
	{putLoad, "follower", [...]float64{0.10, 0.09, 0.26, 0.42}},
	{getLoad, "leader", [...]float64{0.38, 0.28, 0.58, 0.65}},
	{getLoad, "follower", [...]float64{0.23, 0.22, 0.50, 0.62}},
	{localLoad, "leader", [...]float64{0, 0, 0.85, 0.88}},
}

// barK6 is the bar of the k6 row.
const barK6 = 0.20

// cells returns every cell. The empty handler comes right before what is compared to it, so that both meet
// the machine in the same mood.
func (b *bench) cells() []cell {
	var cells []cell
	for i, n := range conns {
		for _, empty := range []load{putLoad, getLoad} {
			cells = append(cells, cell{
				name: cellName(empty.name, "empty", n),
				measure: func(ctx context.Context) (sample, error) {
					return b.wrk(ctx, empty, b.empty, n)
				},
			})
			for _, row := range bars {
				if row.load.baseline != empty.name || row.bars[i] == 0 {
					continue
				}
				cells = append(cells, cell{
					name:     cellName(row.load.name, row.target, n),
					baseline: cellName(empty.name, "empty", n),
					bar:      row.bars[i],
					measure: func(ctx context.Context) (sample, error) {
						return b.withLeader(ctx, func(leader, follower string) (sample, error) {
							if row.target == "follower" {
								return b.wrk(ctx, row.load, follower, n)
							}
							return b.wrk(ctx, row.load, leader, n)
						})
					},
				})
			}
		}
	}
	return append(cells,
		cell{
			name: "k6-empty",
			measure: func(ctx context.Context) (sample, error) {
				return b.k6(ctx, []string{b.empty}, "RAFTRV_EMPTY=1")
			},
		},
		cell{
			name:     "k6-contacts",
			baseline: "k6-empty",
			bar:      barK6,
			measure: func(ctx context.Context) (sample, error) {
				return b.k6(ctx, b.cluster.URLs())
			},
		})
}

func cellName(load, target string, conns int) string {
	return fmt.Sprintf("%s-%s-c%d", load, target, conns)
}

// selectCells returns the cells whose names match, and their baselines.
func selectCells(all []cell, match *regexp.Regexp) []cell {
	wanted := make(map[string]bool)
	for _, c := range all {
		if match.MatchString(c.name) {
			wanted[c.name] = true
			wanted[c.baseline] = true
		}
	}
	return slices.DeleteFunc(all, func(c cell) bool { return !wanted[c.name] })
}
