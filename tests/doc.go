// Package tests drives real nodes: processes, sockets, files and clocks as users
// have them. What can be said of a part alone is tested beside that part.
package tests
