package main

// This file is the feature level: which commands, formats and rules a cluster
// uses. Every member applies the same entries in the same way only if it knows
// what they mean, so a cluster uses what all of its members know.

// levelFirst is the level of a cluster whose members are not known to be newer.
const levelFirst = 1

// level returns the feature level of the cluster, as far as this member has
// applied its log.
func (s *kvstore) level() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state.level
}
