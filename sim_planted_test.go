package main

import "go.etcd.io/raft/v3/raftpb"

// plant is a bug, planted at the edges of the product.
type plant struct {
	name        string
	disk        func(p *process) disk
	incoming    func(p *process, m *raftpb.Message)
	answerRead  bool
	answerWrite bool
	afterCrash  func(n *simNode)
}
